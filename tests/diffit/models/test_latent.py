"""LatentDiffiT: its formula, the published names and guidance, checks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffit.models import LatentDiffiT
from tests.diffit.models.networks import latent_inputs, plain_latent, small_latent
from tests.numeric_rule import assert_numeric_rule


def outputs(network: LatentDiffiT, y: Tensor) -> dict[str, Tensor]:
    """y and the gradients of all parameters of sum(y * weights)."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    names, parameters = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, parameters, weights.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_formula(fastest_backend: str, dtype: torch.dtype) -> None:
    x, t, y = latent_inputs(dtype=dtype)
    network = small_latent().to(dtype)
    exact = copy.deepcopy(network).double()
    with torch.no_grad():
        got, plain = network(x, t, y), plain_latent(network, x, t, y)
        truth = plain_latent(exact, x.double(), t, y)
    assert_numeric_rule({"y": got}, {"y": plain}, {"y": truth})


def test_gradients_in_float64() -> None:
    """All parameters; those of the keys, which softmax does not see, are exactly zero."""
    network, (x, t, y) = small_latent().double(), latent_inputs(dtype=torch.float64)
    plain = copy.deepcopy(network)
    plain.state_dict = lambda: dict(plain.named_parameters()) | dict(plain.named_buffers())  # type: ignore[method-assign]
    got, truth = outputs(network, network(x, t, y)), outputs(plain, plain_latent(plain, x, t, y))
    for name, gradient in truth.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-11, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in got.values())


def test_published_sizes() -> None:
    """561.04 and 562.38 million parameters, 561 reported."""
    for input_size, millions in ((32, 561.04), (64, 562.38)):
        with torch.device("meta"):
            network = LatentDiffiT(input_size)
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def test_published_names() -> None:
    network = LatentDiffiT(8, hidden_size=12, depth=1, num_heads=2, num_classes=3)
    block = {
        "attn.qkv.weight": (36, 12),
        "attn.qkv.bias": (36,),
        "attn.qkv_temb.weight": (36, 12),
        "attn.qkv_temb.bias": (36,),
        "attn.proj.weight": (12, 12),
        "attn.proj.bias": (12,),
        "attn.relative_position_bias_table": (49, 2),
        "mlp.fc1.weight": (48, 12),
        "mlp.fc1.bias": (48,),
        "mlp.fc2.weight": (12, 48),
        "mlp.fc2.bias": (12,),
    }
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == {
        "x_embedder.proj.weight": (12, 4, 2, 2),
        "x_embedder.proj.bias": (12,),
        "t_embedder.mlp.0.weight": (12, 256),
        "t_embedder.mlp.0.bias": (12,),
        "t_embedder.mlp.2.weight": (12, 12),
        "t_embedder.mlp.2.bias": (12,),
        "y_embedder.embedding_table.weight": (4, 12),
        "pos_embed": (1, 16, 12),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "final_layer.linear.weight": (32, 12),
        "final_layer.linear.bias": (32,),
    }


@pytest.mark.parametrize(
    ("t", "w"),
    [(999, 1.0), (900, 1.0), (750, 1.0), (500, 1.033), (250, 1.773), (100, 3.501), (0, 4.4)],
)
def test_guidance_of_256_pixels(t: int, w: float) -> None:
    """The published weights of scale 4.4, on three of the four channels of the noise."""
    network, (x, _, y) = small_latent().double(), latent_inputs(2, torch.float64)
    t_of = torch.full((4,), t)
    labels = torch.cat([y, torch.full_like(y, 5)])
    with torch.no_grad():
        out = network.forward_with_cfg(torch.cat([x, torch.zeros_like(x)]), t_of, labels, 4.4)
        conditional = network(x, t_of[:2], y)
        unconditional = network(x, t_of[:2], labels[2:])
    exact = 1 + 3.4 * (1 - math.cos(math.pi * (1 - t / 1000) ** 4)) / 2
    assert abs(exact - w) < 5e-4
    eps = unconditional[:, :3] + exact * (conditional[:, :3] - unconditional[:, :3])
    torch.testing.assert_close(out[:2, :3], eps)
    torch.testing.assert_close(out[2:, :3], eps)
    torch.testing.assert_close(out[:2, 3:], conditional[:, 3:])
    torch.testing.assert_close(out[2:, 3:], unconditional[:, 3:])


@pytest.mark.parametrize(
    ("options", "power"), [({"input_size": 64, "patch_size": 32}, 4.0), ({}, 0.0)]
)
def test_constant_guidance(options: dict[str, Any], power: float) -> None:
    """At 64 x 64 latents as published, elsewhere where the power is zero."""
    network = small_latent(**options).double()
    x = torch.randn(2, 4, network.input_size, network.input_size, dtype=torch.float64)
    t, y = torch.tensor([990, 990]), torch.tensor([3, 5])
    with torch.no_grad():
        out = network.forward_with_cfg(x, t, y, 1.49, power)
        conditional, unconditional = network(x[[0, 0]], t, y)[:, :3]
    torch.testing.assert_close(out[0, :3], unconditional + 1.49 * (conditional - unconditional))


def test_label_dropout() -> None:
    """Every label becomes none where all are dropped, and only while training."""
    network, (x, t, y) = small_latent(class_dropout_prob=1.0), latent_inputs()
    with torch.no_grad():
        none, given = network(x, t, torch.full_like(y, 5)), network(x, t, y)
        assert not torch.allclose(none, given)
        torch.testing.assert_close(network.train()(x, t, y), none)


def test_without_a_variance() -> None:
    network, (x, t, y) = small_latent(learn_sigma=False), latent_inputs()
    assert network(x, t, y).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 8, 8)}, r"x: expected \(B, 4, 6, 6\), got shape \(3, 4, 8, 8\)"),
        ({"x": torch.zeros(3, 3, 6, 6)}, r"x: expected \(B, 4, 6, 6\)"),
        ({"x": torch.zeros(4, 6, 6)}, r"x: expected \(B, 4, 6, 6\)"),
        ({"t": torch.zeros(2)}, r"t: expected \(3,\), one for each of x, got shape \(2,\)"),
        ({"t": torch.tensor(5)}, r"t: expected \(3,\)"),
        ({"y": torch.zeros(3, 1, dtype=torch.int64)}, r"y: expected \(3,\)"),
    ],
)
def test_wrong_inputs(change: dict[str, Tensor], message: str) -> None:
    inputs = dict(zip("xty", latent_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        small_latent()(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 7}, "input_size: expected a multiple of patch_size = 2, got 7"),
        ({"hidden_size": 18, "num_heads": 3}, "hidden_size: expected a multiple of 4, got 18"),
        ({"num_heads": 3}, "dim: expected a multiple of num_heads = 3, got 16"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_wrong_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_latent(**options)
