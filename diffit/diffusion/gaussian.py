"""Diffusion in discrete steps with learned variances (IDDPM, ADM), and its DDPM and DDIM samplers.

Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (IDDPM), Dhariwal and
Nichol 2021 (ADM). Coefficients are float64; results have the dtype of x, the samplers' is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from diffit.diffusion.edm import RandnLike

Model = Callable[[Tensor, Tensor], Tensor]

BIN = 1 / 255  # half the distance of two of 256 levels in [-1, 1]
SMALLEST = 1e-12  # probability of which a logarithm is taken


class Prediction(NamedTuple):
    """The distribution of the step before, ``N(mean, variance)``, all of the shape of x."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class Losses(NamedTuple):
    """Of every image, (B,): ``loss = mse + vb``; ``vb`` is None where the variance is fixed."""

    loss: Tensor
    mse: Tensor
    vb: Tensor | None


def spaced_timesteps(num_steps: int, respacing: int | str | None) -> list[int]:
    """The time steps that a sampler visits, rising.

    Args:
        num_steps: of the full process.
        respacing: None: all. A number: so many, from 0 to num_steps - 1, as evenly as whole numbers
            can be (IDDPM). "ddimN": N, every k-th from 0 for a whole k (DDIM).

    Raises:
        ValueError: there are no such steps.
    """
    if respacing is None:
        return list(range(num_steps))
    if isinstance(respacing, int) and 1 <= respacing <= num_steps:
        stride = (num_steps - 1) / max(respacing - 1, 1)
        # Added up as IDDPM does: a product rounds some halves the other way.
        return [round(step) for step in accumulate(repeat(stride, respacing - 1), initial=0.0)]
    if isinstance(respacing, str) and respacing[:4] == "ddim" and respacing[4:].isdecimal():
        count = int(respacing[4:])
        for stride in range(1, num_steps + 1):
            if len(steps := range(0, num_steps, stride)) == count:
                return list(steps)
    raise ValueError(
        f"respacing: expected None, a number 1..{num_steps}, or 'ddimN' where every k-th of "
        f"{num_steps} steps for some k makes N, got {respacing!r}"
    )


def linear_betas(num_steps: int) -> Tensor:
    """From 1e-4 to 0.02 in 1000 steps, scaled for other numbers of them (ADM): float64."""
    if num_steps <= 20:  # beta would reach 1
        raise ValueError(f"num_steps: expected at least 21, got {num_steps}")
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


class GaussianDiffusion:
    """``q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)``, its reverse, losses and samplers.

    The model predicts the noise, and with ``learn_sigma`` in as many channels again a number v in
    -1..1 for the variance: ``ln var = (v + 1) / 2 ln beta_t + (1 - v) / 2 ln beta~_t``. Models are
    called as ``model(x, t)`` with t (B,) int64, steps of the full process; labels are bound before
    (``guided``, ``functools.partial``). x comes in the dtype of the model's parameters; a callable
    without any gets that of the noise or x it is asked about.

    Args:
        num_steps: steps of the full process.
        schedule: "linear".
        learn_sigma: whether the model predicts the variance; otherwise it is beta_t.
        respacing: visit fewer steps, see ``spaced_timesteps``: 250, "ddim50".

    Attributes:
        timestep_map: (S,), int64, the visited steps of the full process. Methods take t as an index
            into it, 0..S - 1.
        betas, alphas_cumprod: (S,), float64, of the visited steps.

    Raises:
        ValueError: an argument that does not fit, naming it.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        schedule: str = "linear",
        learn_sigma: bool = True,
        respacing: int | str | None = None,
    ) -> None:
        if schedule != "linear":
            raise ValueError(f"schedule: expected 'linear', got {schedule!r}")
        full = torch.cumprod(1 - linear_betas(num_steps), dim=0)
        self.learn_sigma = learn_sigma
        self.timestep_map = torch.tensor(spaced_timesteps(num_steps, respacing))
        self.alphas_cumprod = full[self.timestep_map]
        before = torch.cat([full.new_ones(1), self.alphas_cumprod[:-1]])
        self.alphas_cumprod_prev = before
        self.betas = 1 - self.alphas_cumprod / before

        # q(x_{t-1} | x_t, x_0) (DDPM, eq. 7). Its variance is 0 at t = 0: where a logarithm is
        # taken, that of t = 1 stands in.
        noise = 1 - self.alphas_cumprod
        variance = self.betas * (1 - before) / noise
        self.posterior_mean_x0 = self.betas * before.sqrt() / noise
        self.posterior_mean_xt = (1 - before) * (1 - self.betas).sqrt() / noise
        second = variance[1:2] if len(variance) > 1 else self.betas
        self.posterior_log_variance = torch.cat([second, variance[1:]]).log()
        self.log_betas = self.betas.log()
        # As ADM: at t = 0 a fixed variance is as small as it may be.
        self.fixed_log_variance = torch.cat([second, self.betas[1:]]).log()

    def __len__(self) -> int:
        return len(self.timestep_map)

    def _check_steps(self, t: Tensor, x: Tensor) -> None:
        if t.shape != x.shape[:1] or t.is_floating_point():
            raise ValueError(
                f"t: expected ({len(x)},), integers, got shape {tuple(t.shape)}, {t.dtype}"
            )
        # On other devices the check would wait for all that is under way.
        if t.device.type == "cpu" and bool(((t < 0) | (t >= len(self))).any()):
            raise ValueError(f"t: expected 0..{len(self) - 1}, got {t.tolist()}")

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise``.

        Args:
            x0: (B, C, H, W).
            t: (B,), int64, 0..S - 1.
            noise: like x0; None: drawn.

        Returns:
            (B, C, H, W), the dtype of x0.

        Raises:
            ValueError: t out of range, or noise of another shape.
        """
        self._check_steps(t, x0)
        noise = torch.randn_like(x0) if noise is None else noise
        if noise.shape != x0.shape:
            raise ValueError(
                f"noise: expected the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}"
            )
        abar = self.alphas_cumprod
        return _at(abar.sqrt(), t, x0) * x0 + _at((1 - abar).sqrt(), t, x0) * noise

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, *, clip_denoised: bool = False
    ) -> Prediction:
        """The distribution of x_{t-1} that the model predicts.

        Args:
            model: ``model(x, t)``, see the class.
            x: (B, C, H, W), x_t.
            t: (B,), int64, 0..S - 1.
            clip_denoised: clamp the predicted x_0 to [-1, 1]: for pictures, not for latents.

        Raises:
            ValueError: t out of range, or an output of the model that does not fit.
        """
        eps, v = self.predict(model, x, t)
        return self._distribution(x, t, eps, v, clip_denoised)

    def predict(self, model: Model, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the model says at t: the noise, and v, or None without ``learn_sigma``.

        Args and errors are those of ``p_mean_variance``.
        """
        self._check_steps(t, x)
        out = in_dtype(model, x.dtype)(x, self.timestep_map.to(t.device)[t])
        channels = x.shape[1] * (2 if self.learn_sigma else 1)
        expected = (len(x), channels, *x.shape[2:])
        if out.shape != expected:
            raise ValueError(
                f"model: expected outputs {expected} for learn_sigma = {self.learn_sigma}, "
                f"got {tuple(out.shape)}"
            )
        out = out.to(x.dtype)
        if not self.learn_sigma:
            return out, None
        eps, v = out.chunk(2, dim=1)
        return eps, v

    def _distribution(
        self, x: Tensor, t: Tensor, eps: Tensor, v: Tensor | None, clip_denoised: bool
    ) -> Prediction:
        if v is None:
            log_variance = _at(self.fixed_log_variance, t, x).expand_as(x)
        else:
            fraction = (v + 1) / 2
            log_variance = fraction * _at(self.log_betas, t, x)
            log_variance = log_variance + (1 - fraction) * _at(self.posterior_log_variance, t, x)
        abar = self.alphas_cumprod
        x0 = (x - _at((1 - abar).sqrt(), t, x) * eps) / _at(abar.sqrt(), t, x)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        return Prediction(self._posterior_mean(x0, x, t), log_variance.exp(), log_variance, x0)

    def _posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return _at(self.posterior_mean_x0, t, x) * x0 + _at(self.posterior_mean_xt, t, x) * x

    @torch.no_grad()
    def p_sample_loop(
        self,
        model: Model,
        noise: Tensor,
        *,
        randn_like: RandnLike = torch.randn_like,
        clip_denoised: bool = False,
    ) -> Tensor:
        """DDPM's ancestral sampling: one evaluation for each visited step.

        Args:
            model: ``model(x, t)``, see the class.
            noise: (B, C, H, W), normal.
            randn_like: the source of the noise of the steps. With that of an ``ImageNoise`` an
                image depends on its seed only.
            clip_denoised: see ``p_mean_variance``.

        Returns:
            (B, C, H, W), float64.
        """
        model = in_dtype(model, noise.dtype)
        x = noise.double()
        for i in reversed(range(len(self))):
            t = torch.full((len(x),), i, device=x.device)
            p = self.p_mean_variance(model, x, t, clip_denoised=clip_denoised)
            x = p.mean
            if i > 0:
                x = x + (p.log_variance / 2).exp() * randn_like(x)
        return x

    @torch.no_grad()
    def ddim_sample_loop(
        self,
        model: Model,
        noise: Tensor,
        eta: float = 0.0,
        *,
        randn_like: RandnLike = torch.randn_like,
        clip_denoised: bool = False,
    ) -> Tensor:
        """DDIM's sampling (eq. 12 and 16): one evaluation for each visited step.

        Args:
            model, noise, randn_like, clip_denoised: see ``p_sample_loop``.
            eta: 0: deterministic, no noise is drawn. 1: with the noise of DDPM.

        Returns:
            (B, C, H, W), float64.

        Raises:
            ValueError: eta out of range.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected 0..1, got {eta}")
        model = in_dtype(model, noise.dtype)
        x = noise.double()
        for i in reversed(range(len(self))):
            t = torch.full((len(x),), i, device=x.device)
            x0 = self.p_mean_variance(model, x, t, clip_denoised=clip_denoised).pred_xstart
            abar, before = float(self.alphas_cumprod[i]), float(self.alphas_cumprod_prev[i])
            sigma = eta * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
            noisy = x
            x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps
            if sigma > 0:
                x = x + sigma * randn_like(noisy)
        return x

    def training_losses(
        self, model: Model, x0: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> Losses:
        """IDDPM's hybrid loss of every image.

        ``mse`` is the mean square error of the noise. ``vb`` is term t of the variational bound in
        bits per dimension, times S / 1000 (IDDPM, eq. 16: lambda = 0.001 of a sum over S terms).
        Its gradient reaches the variance only: the mean is held fixed.

        Args:
            model: ``model(x, t)``, see the class.
            x0: (B, C, H, W), latents or pictures in [-1, 1].
            t: (B,), int64, 0..S - 1.
            noise: like x0; None: drawn.

        Returns:
            (B,) each, the dtype of x0. Summed over accumulated parts and processes and divided by
            the global batch, they are the losses of the global batch.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        x = self.q_sample(x0, t, noise)
        eps, v = self.predict(model, x, t)
        mse = (noise - eps).square().flatten(1).mean(1)
        if v is None:
            return Losses(mse, mse, None)
        vb = self._bound(x0, x, t, eps.detach(), v) * (len(self) / 1000)
        return Losses(mse + vb, mse, vb)

    def _bound(self, x0: Tensor, x: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """Term t of the variational bound in bits per dimension (IDDPM, eq. 4-7): (B,)."""
        p = self._distribution(x, t, eps, v, clip_denoised=False)
        q_log_variance = _at(self.posterior_log_variance, t, x)
        difference = self._posterior_mean(x0, x, t) - p.mean
        ratio = q_log_variance - p.log_variance
        kl = (ratio.exp() - ratio - 1 + difference**2 * (-p.log_variance).exp()) / 2
        nll = -_discretized_log_likelihood(x0, p.mean, p.log_variance)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
        return nats.flatten(1).mean(1) / math.log(2)


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The entries t (B,) of a table, to be multiplied with x (B, C, H, W)."""
    return table.to(x.device)[t].to(x.dtype).view(-1, 1, 1, 1)


def in_dtype(model: Model, default: torch.dtype) -> Model:
    """The model, which sees x in the dtype of its parameters, or without any in the default."""
    parameters = getattr(model, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    dtype = default if first is None else first.dtype
    return lambda x, t: model(x.to(dtype), t)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """ln of the probability of the level of x, of 256 in [-1, 1]; the outer ones reach to infinity.

    DDPM, eq. 13, with the normal distribution function itself where IDDPM approximates it.
    """
    scale = (-log_variance / 2).exp()
    above = torch.special.ndtr((x + BIN - mean) * scale)
    below = torch.special.ndtr((x - BIN - mean) * scale)
    above = torch.where(x > 0.999, 1.0, above)
    below = torch.where(x < -0.999, 0.0, below)
    return (above - below).clamp(min=SMALLEST).log()
