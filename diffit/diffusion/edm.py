"""EDM: preconditioning, loss and sampler (Karras et al. 2022, "Elucidating the Design Space")."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Denoiser = Callable[..., Tensor]
RandnLike = Callable[[Tensor], Tensor]

MAX_CHURN = math.sqrt(2) - 1  # gamma never adds more noise than there is already


def one_hot(class_labels: Tensor, label_dim: int) -> Tensor:
    """(B,) ids, ``label_dim`` meaning no class -> (B, label_dim), float32, a zero row for no class.

    Labels that are (B, label_dim) already come back as they are.

    Raises:
        ValueError: another shape, or an id out of range.
        TypeError: ids that are no integers.
    """
    if class_labels.dim() == 2 and class_labels.shape[1] == label_dim:
        return class_labels
    if class_labels.dim() != 1:
        raise ValueError(
            f"class_labels: expected (B,) ids or (B, {label_dim}) one-hot, "
            f"got shape {tuple(class_labels.shape)}"
        )
    check_class_ids(class_labels, label_dim)
    rows = torch.eye(label_dim + 1, label_dim, device=class_labels.device)
    return rows[class_labels.long()]


def check_class_ids(class_labels: Tensor, num_classes: int) -> None:
    """Raise unless all are integers 0..num_classes; the last means no class."""
    if class_labels.is_floating_point() or class_labels.is_complex():
        raise TypeError(f"class_labels: expected integers, got {class_labels.dtype}")
    wrong = class_labels[(class_labels < 0) | (class_labels > num_classes)]
    if len(wrong):
        raise ValueError(
            f"class_labels: expected 0..{num_classes - 1}, or {num_classes} for no class, "
            f"got {wrong[0].item()}"
        )


class EDMDenoiser(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)`` around the network F (EDM, table 1).

    ``c_skip = sd^2 / (sigma^2 + sd^2)``, ``c_out = sigma sd / sqrt(sigma^2 + sd^2)``,
    ``c_in = 1 / sqrt(sigma^2 + sd^2)``, ``c_noise = ln(sigma) / 4``, sd the deviation of the data.

    Args:
        model: F, with the protocol and the attributes of ``diffit.models.ImageDiffiT``.
        sigma_data: sd.
        sigma_min, sigma_max: noise levels that the sampler keeps to.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_data: float = 0.5,
        *,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: expected a positive number, got {sigma_data}")
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min: expected 0 <= sigma_min < sigma_max = {sigma_max}, got {sigma_min}"
            )
        self.model = model
        self.sigma_data = sigma_data
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.img_resolution = model.img_resolution
        self.img_channels = model.img_channels
        self.label_dim: int = model.label_dim  # type: ignore[assignment]

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows: sigma itself."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Denoise.

        Args:
            x: (B, img_channels, img_resolution, img_resolution), pictures plus sigma times noise.
            sigma: (B,), or one for all.
            class_labels: (B,) ids, ``label_dim`` meaning no class, or (B, label_dim) one-hot.
            model_kwargs: passed on, for example ``augment_labels``.

        Returns:
            (B, ...), float32: the expected picture. The network runs in the dtype of its
            parameters, what is around it in float32.

        Raises:
            ValueError, TypeError: labels or an input that do not fit, naming them.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        sigma = sigma.expand(len(x)).view(-1, 1, 1, 1)
        if class_labels is not None:
            class_labels = one_hot(class_labels, self.label_dim).to(x.device)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.log().flatten() / 4
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        f = self.model((c_in * x).to(dtype), c_noise, class_labels, **model_kwargs)
        return c_skip * x + c_out * f.float()


def edm_loss(
    denoiser: Denoiser,
    images: Tensor,
    class_labels: Tensor | None = None,
    *,
    sigma_data: float | None = None,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    randn_like: RandnLike = torch.randn_like,
    **model_kwargs: Any,
) -> Tensor:
    """EDM's loss of every image: ``weight(sigma) |D(y + sigma n; sigma) - y|^2`` (EDM, eq. 108).

    ``ln sigma ~ N(p_mean, p_std^2)``, ``weight = (sigma^2 + sd^2) / (sigma sd)^2``. The mean
    is over the pixels of an image: near 1 for a network that knows nothing, whatever the size.
    Summed over accumulated parts and processes and divided by the global batch, it is the loss of
    the global batch. EDM minimises the sum over pixels: for its gradients multiply by
    ``images[0].numel()``.

    Args:
        denoiser: ``EDMDenoiser``, or any callable with its protocol.
        images: (B, C, H, W) in [-1, 1], float32.
        class_labels: as the denoiser takes them.
        sigma_data: sd; None: the denoiser's. Needed where a wrapper hides that attribute.
        p_mean, p_std: of the logarithm of the noise level.
        randn_like: the source of noise, called with (B,) and then with (B, C, H, W). With that of
            an ``ImageNoise`` an image's noise depends on its seed only.
        model_kwargs: passed on, for example ``augment_labels``.

    Returns:
        (B,), float32.
    """
    if sigma_data is None:
        sigma_data = float(denoiser.sigma_data)  # type: ignore[attr-defined]
    sigma = (p_mean + p_std * randn_like(images.new_empty(len(images)))).exp()
    noisy = images + sigma.view(-1, 1, 1, 1) * randn_like(images)
    labels = () if class_labels is None else (class_labels,)
    denoised = denoiser(noisy, sigma, *labels, **model_kwargs)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoised - images).square().flatten(1).mean(1)


def edm_sigmas(
    num_steps: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The noise levels of EDM's sampler (eq. 5), falling, and 0: (num_steps + 1,), float64.

    ``(sigma_max^(1/rho) + i / (num_steps - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``

    Raises:
        ValueError: an argument out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            "sigma_min: expected 0 < sigma_min < sigma_max < inf, "
            f"got sigma_min = {sigma_min}, sigma_max = {sigma_max}"
        )
    if not rho > 0:
        raise ValueError(f"rho: expected a positive number, got {rho}")
    progress = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + progress * (last - first)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def edm_sample(
    denoiser: Denoiser,
    latents: Tensor,
    *,
    class_labels: Tensor | None = None,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    randn_like: RandnLike | None = None,
) -> Tensor:
    """EDM's sampler, Heun's method with churn (algorithm 2): 2 num_steps - 1 evaluations.

    Args:
        denoiser: ``denoiser(x, sigma)`` -> the expected picture, x (B, C, H, W) in float64, sigma
            (B,) in float64; the result may have any dtype. Its attributes ``sigma_min``,
            ``sigma_max`` and ``round_sigma``, if it has them, are respected.
        latents: (B, C, H, W), normal noise of deviation 1.
        class_labels: a third argument for the denoiser; None: it gets two.
        num_steps, sigma_min, sigma_max, rho: see ``edm_sigmas``.
        s_churn: amount of noise added along the way; 0: none, the sampler is deterministic.
        s_min, s_max: noise levels between which noise is added.
        s_noise: deviation of the added noise.
        randn_like: its source, ``torch.randn_like`` by default. With that of an ``ImageNoise`` an
            image depends on its seed only.

    Returns:
        (B, C, H, W), float64, on the device of latents.

    Raises:
        ValueError: an argument out of range.
    """
    if s_churn < 0:
        raise ValueError(f"s_churn: expected at least 0, got {s_churn}")
    sigma_min = max(sigma_min, getattr(denoiser, "sigma_min", 0.0))
    sigma_max = min(sigma_max, getattr(denoiser, "sigma_max", math.inf))
    round_sigma = getattr(denoiser, "round_sigma", torch.as_tensor)
    randn_like = randn_like or torch.randn_like
    labels = () if class_labels is None else (class_labels,)

    def slope(x: Tensor, sigma: float) -> Tensor:
        denoised = denoiser(x, x.new_full((len(x),), sigma), *labels)
        return (x - denoised.double()) / sigma

    sigmas = round_sigma(edm_sigmas(num_steps, sigma_min, sigma_max, rho)).tolist()
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        gamma = min(s_churn / num_steps, MAX_CHURN) if s_min <= sigma <= s_max else 0.0
        sigma_hat = float(round_sigma(torch.tensor(sigma * (1 + gamma), dtype=torch.float64)))
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * randn_like(x)
        step = sigma_next - sigma_hat
        d = slope(x, sigma_hat)
        x_next = x + step * d
        if sigma_next > 0:
            x_next = x + step * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x
