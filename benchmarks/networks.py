"""Whole networks: their weights and inputs, what is timed of them, its truth and the contestants.

``forward``: one evaluation without gradients. ``training``: an evaluation, the gradients of all
parameters and, where it is timed, Adam's update. ``sampling``: a whole sampling loop.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from diffit.diffusion import (
    ConstantGuidance,
    EDMDenoiser,
    GaussianDiffusion,
    Guidance,
    ImageNoise,
    PowerCosineGuidance,
    edm_sample,
    guided,
)
from diffit.diffusion.guidance import TOLERANCE
from diffit.models import DiffusionNetwork, ImageDiffiT, LatentDiffiT, Preset
from diffit_kernels import use_backend
from harness import errors
from operations import SEED, TABLE, TABLE_STD, Case, Contestant, Tensors
from peers import compiled, eager, sdpa
from peers.networks import DiffusersDiT, blocks, peer_network
from results import OTHER, OURS

PASSES = ("forward", "training", "sampling")

Inputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Task:
    """What is timed of a network.

    ``batch`` counts samples of an evaluation, and images of a loop. A guided evaluation holds a
    batch of conditional and one of unconditional samples: it is twice as large.
    """

    preset: Preset
    direction: str  # one of PASSES
    batch: int
    guided: bool = False
    steps: int = 0  # of the sampler

    @property
    def operation(self) -> str:
        """The task as a word for the table."""
        if self.direction == "sampling":
            return "loop"
        return "guided step" if self.guided else "step"

    @property
    def evaluations(self) -> int:
        """Samples that the network evaluates for each of ``batch``."""
        if self.direction == "sampling":
            return evaluations(self.preset, self.steps)
        return 2 if self.guided else 1

    @property
    def gflop(self) -> float:
        """10^9 operations, a multiply-add being two; a gradient takes two passes more."""
        passes = 3 if self.direction == "training" else 1
        return 2 * self.preset.gflops * self.batch * self.evaluations * passes


def make_network(preset: Preset, dtype: torch.dtype, device: torch.device) -> DiffusionNetwork:
    """The network of a preset with seeded weights, none of which is zero as in a new one.

    All parameters have the dtype. Dropout is off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = preset.network(**preset.options)
        for name, parameter in network.named_parameters():
            if name.endswith(TABLE):
                nn.init.normal_(parameter, std=TABLE_STD)
            elif not parameter.any():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1000
                nn.init.normal_(parameter, std=fan_in**-0.5)
    return network.to(device, dtype).eval()


def evaluation_inputs(
    network: DiffusionNetwork, batch: int, guided: bool, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Noise, times and labels for one evaluation."""
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(network, LatentDiffiT):
        x = torch.randn(batch, *_picture(network), generator=generator)
        t = torch.linspace(999, 0, batch + 2)[1:-1].long()
        y = torch.arange(batch) % network.num_classes
        if guided:
            x, t, y = x.repeat(2, 1, 1, 1), t.repeat(2), y.repeat(2)
            y[batch:] = network.num_classes
        return x.to(device, dtype), t.to(device), y.to(device)
    assert isinstance(network, ImageDiffiT)
    x = torch.randn(batch, *_picture(network), generator=generator)
    c_noise = torch.linspace(1, -1.5, batch + 2)[1:-1]
    labels = [
        torch.eye(batch, width) if width else None
        for width in (network.label_dim, network.augment_dim)
    ]
    rest = (label if label is None else label.to(device, dtype) for label in labels)
    return x.to(device, dtype), c_noise.to(device), *rest


def guidance(preset: Preset) -> Guidance | None:
    """That of the preset, None: it is sampled without."""
    scale = preset.sampling.guidance_scale
    if scale == 1:
        return None
    power_cosine = preset.sampling.guidance_schedule == "power-cosine"
    return PowerCosineGuidance(scale) if power_cosine else ConstantGuidance(scale)


def evaluations(preset: Preset, steps: int) -> int:
    """Evaluations of the network for one image."""
    if preset.sampling.sampler == "edm":
        return 2 * steps - 1
    guide = guidance(preset)
    if guide is None:
        return steps
    weights = guide.weight(GaussianDiffusion(respacing=steps).timestep_map)
    return steps + int(((weights - 1).abs() > TOLERANCE).sum())


def sample(network: nn.Module, preset: Preset, batch: int, steps: int) -> Tensor:
    """A whole sampling loop as the preset says, but for the number of steps: (B, C, H, W)."""
    weight = next(network.parameters())
    noise = ImageNoise(range(batch))
    x = noise.randn((batch, *_picture(network)), device=weight.device)
    if preset.sampling.sampler == "edm":
        denoiser = EDMDenoiser(network, preset.sampling.sigma_data)
        labels = torch.arange(batch) % denoiser.label_dim if denoiser.label_dim else None
        return edm_sample(denoiser, x, class_labels=labels, num_steps=steps)
    diffusion = GaussianDiffusion(respacing=steps, learn_sigma=bool(network.learn_sigma))
    guide = guidance(preset) or ConstantGuidance(1.0)
    labels = torch.arange(batch) % int(network.num_classes)  # type: ignore[arg-type]
    model = guided(network, labels, guide)
    return diffusion.p_sample_loop(model, x.to(weight.dtype), randn_like=noise.randn_like)


class NetworkContestant(Contestant):
    """A network, which can also take a training step and be sampled."""

    def call(self, direction: str) -> Callable[[], Tensors]:
        """What is timed, with its named results."""
        return self._training if direction == "training" else super().call("forward")

    def _training(self) -> Tensors:
        leaves = list(self.leaves.values())
        grads = torch.autograd.grad(self.outputs(), leaves, self.grad_outputs)
        return dict(zip(self.leaves, grads, strict=True))


def build(task: Task, dtype: torch.dtype, device: torch.device) -> Case:
    """Ours, the peers and the DiT, with the truth of the network in float64.

    What is verified of a sampling loop is its network, in evaluations of the sizes that the loop
    makes. One limit holds for the gradients of all parameters: twice the largest error that plain
    PyTorch makes in any of them.
    """
    network = make_network(task.preset, dtype, device)
    sizes = [task.guided]
    if task.direction == "sampling":
        sizes = [False] if guidance(task.preset) is None else [False, True]
    inputs = [evaluation_inputs(network, task.batch, size, dtype, device) for size in sizes]

    judged = network

    @cache
    def adam(network: nn.Module) -> torch.optim.Adam:
        """One for all that share parameters: two sets of moments may not fit into memory."""
        return torch.optim.Adam(network.parameters(), lr=0.0)  # they stay as they are

    def contestant(name: str, network: nn.Module, compiled: bool = False) -> Contestant:
        dtype = next(network.parameters()).dtype
        fed = [[inputs_of(value, dtype) for value in values] for values in inputs]
        leaves: Tensors = {}
        if task.direction == "training":
            leaves |= network.named_parameters()
        made = NetworkContestant(
            name,
            lambda: tuple(network(*values) for values in fed),
            leaves,
            tuple(_output_gradient(network, values) for values in fed) if leaves else (),
            {task.direction: task.gflop},
            compiled,
        )
        if task.direction == "training":
            updated = network if name == OTHER else judged
            return replace(made, timed=_updating(made, updated, adam(updated)))
        if task.direction == "sampling":
            loop = partial(sample, network, task.preset, task.batch, task.steps)
            return replace(made, timed=lambda: {"images": loop()})
        return made

    plain = contestant(eager.PEER.name, peer_network(network, eager.PEER))
    truth, plain_errors = _judge(contestant("truth", deepcopy(network).double()), plain, task)
    contestants = [
        contestant(OURS, network),
        plain,
        contestant(sdpa.PEER.name, peer_network(network, sdpa.PEER)),
    ]
    for peer in compiled.PEERS:
        compiling = peer_network(network, replace(peer, compiled=False))
        compiling.compile(dynamic=False)
        contestants.append(contestant(peer.name, compiling, compiled=True))
    if isinstance(network, LatentDiffiT) and find_spec("diffusers") is not None:
        contestants.append(contestant(OTHER, DiffusersDiT(network, dtype, device)))
    return Case(contestants, {task.direction: truth}, {task.direction: plain_errors})


def _updating(
    made: NetworkContestant, network: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], Tensors]:
    """A training step with the update of the parameters."""

    def step() -> Tensors:
        grads = made.call("training")()
        for name, parameter in network.named_parameters():
            parameter.grad = grads[name]
        optimizer.step()
        optimizer.zero_grad()
        return grads

    return step


def _judge(exact: Contestant, plain: Contestant, task: Task) -> tuple[Tensors, dict[str, float]]:
    with use_backend("reference"):
        truth = exact.call(task.direction)()
    truth = {name: tensor.detach() for name, tensor in truth.items()}
    found = errors(plain.call(task.direction)(), truth)
    return truth, dict.fromkeys(found, max(found.values()))


def inputs_of(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An input in the dtype of the network, where it is a picture or a label."""
    floating = value is not None and value.is_floating_point() and value.dim() > 1
    return value.to(dtype) if floating and value is not None else value


def _output_gradient(network: nn.Module, values: list[Tensor | None]) -> Tensor:
    x = values[0]
    assert x is not None
    channels = getattr(network, "out_channels", x.shape[1])
    generator = torch.Generator().manual_seed(SEED + 1)
    grad = torch.randn(len(x), channels, *x.shape[2:], generator=generator)
    return (grad / grad.numel() ** 0.5).to(x.device, x.dtype)


def _picture(network: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of what the network denoises."""
    names = ("in_channels", "input_size")
    if isinstance(network, ImageDiffiT):
        names = ("img_channels", "img_resolution")
    channels, size = (int(getattr(network, name)) for name in names)
    return channels, size, size


def memory_estimate(task: Task, dtype: torch.dtype) -> int:
    """Bytes that a contest needs at most, roughly: parameters, gradients, activations.

    A block keeps about 30 numbers per token and channel, and its logits three times, for training.
    """
    with torch.device("meta"):
        network = task.preset.network(**task.preset.options)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    activations = [
        30 * problem.tokens * problem.dim
        + 3 * problem.tokens * problem.window_tokens * problem.num_heads
        for _, _, problem in blocks(network)
    ]
    training = task.direction == "training"
    samples = task.batch * (1 if training or guidance(task.preset) is None else 2)
    kept = sum(activations) if training else max(activations)
    # At most while the truth is computed, and plain PyTorch beside it.
    weights = parameters * (8 + dtype.itemsize) * (2 if training else 1)
    if training:  # moments, also of the DiT
        weights += 4 * parameters * dtype.itemsize
    return weights + 8 * samples * kept
