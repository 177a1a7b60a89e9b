"""What all networks share: checkpointing, meta tensors, starting anew, compiling, exporting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from tests.diffit.models.networks import (
    image_inputs,
    latent_inputs,
    small_ddpmpp,
    small_image,
    small_latent,
    small_vit,
)

NETWORKS: dict[str, tuple[Callable[..., Any], Callable[..., tuple[Tensor, ...]]]] = {
    "image": (small_image, image_inputs),
    "latent": (small_latent, latent_inputs),
    "vit": (small_vit, image_inputs),
    "ncsn++": (partial(small_ddpmpp, ncsnpp=True, tmsa=True), image_inputs),
}
every = pytest.mark.parametrize(("make", "inputs"), NETWORKS.values(), ids=NETWORKS)


@every
def test_checkpointing(make: Any, inputs: Any) -> None:
    """The same bits of result and gradients, and far less kept for the backward pass."""
    network = make()
    kept: dict[bool, int] = {}
    grads = {}
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            y = network(*inputs())
        kept[enable] = sum(sizes)
        grads[enable] = torch.autograd.grad(y.square().sum(), list(network.parameters()))
    assert kept[True] < kept[False] / 2
    assert all(map(torch.equal, *grads.values()))


@every
def test_from_meta(make: Any, inputs: Any) -> None:
    """Nothing is allocated there; ``reset_parameters`` then gives what the constructor gives."""
    made = make()
    cls, config = type(made), made._hub_mixin_config
    torch.manual_seed(3)
    direct, args = cls(**config).eval(), inputs()
    with torch.device("meta"):
        empty = cls(**config).eval()
    assert empty(*(tensor.to("meta") for tensor in args)).shape == made(*args).shape
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    filled = empty.to_empty(device="cpu")
    for tensor in filled.state_dict().values():
        tensor.fill_(torch.nan)
    filled.reset_parameters()
    assert torch.equal(filled(*args), direct(*args))
    for (name, got), expected in zip(
        filled.state_dict().items(), direct.state_dict().values(), strict=True
    ):
        assert got.isfinite().all(), name
        if got.numel() > 400:  # drawn from the same distribution
            assert got.std().item() == pytest.approx(expected.std().item(), rel=0.3, abs=1e-6), name


def test_frequencies_start_anew() -> None:
    network = small_image(time_embedding="fourier")
    before = network.time.fourier.frequencies.clone()
    network.reset_parameters()
    assert not torch.equal(network.time.fourier.frequencies, before)


@pytest.mark.parametrize(("make", "inputs"), list(NETWORKS.values())[:2], ids=["image", "latent"])
def test_compiles_whole(make: Any, inputs: Any) -> None:
    """In one graph, forward and backward, and once for all batches."""
    network = make()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*inputs(2)).sum().backward()
    network.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = compiled(*inputs(5))
        got.square().sum().backward()
    expected = network(*inputs(5))
    torch.testing.assert_close(got, expected)
    names, parameters = zip(*network.named_parameters(), strict=True)
    exact = torch.autograd.grad(expected.square().sum(), parameters)
    for name, parameter, gradient in zip(names, parameters, exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4, msg=name)
    torch._dynamo.reset()


@every
def test_exports(make: Any, inputs: Any) -> None:
    """With any batch."""
    network, args = make(), inputs(3)
    batch = Dim("batch", min=2, max=64)
    program = torch.export.export(network, args, dynamic_shapes=tuple({0: batch} for _ in args))
    for size in (2, 5):
        torch.testing.assert_close(program.module()(*inputs(size)), network(*inputs(size)))


@every
def test_under_autocast(make: Any, inputs: Any) -> None:
    """Float32 parameters and inputs, products in bfloat16."""
    network, args = make(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(*args)
    exact = network(*args)
    assert (y.float() - exact).abs().max() < 0.1 * exact.abs().max()


@every
def test_copies(make: Any, inputs: Any) -> None:
    network = make()
    assert torch.equal(copy.deepcopy(network)(*inputs()), network(*inputs()))
