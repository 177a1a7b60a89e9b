"""Guidance: its weights, what it evaluates, what it leaves alone."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from diffit.diffusion import (
    ConstantGuidance,
    EDMDenoiser,
    GaussianDiffusion,
    Guidance,
    IntervalGuidance,
    PowerCosineGuidance,
    edm_sample,
    guided,
)
from tests.diffit.diffusion.toys import ToyImage, ToyLatent, waves

SHAPE = (3, 4, 3, 5)
LABELS = torch.tensor([0, 5, 2])


def test_published_table() -> None:
    """s = 4.4, as printed: to half of the last digit."""
    t = torch.tensor([999, 900, 750, 500, 250, 100, 0])
    expected = torch.tensor([1.0, 1.0, 1.0, 1.033, 1.773, 3.501, 4.4], dtype=torch.float64)
    w = PowerCosineGuidance(4.4).weight(t)
    assert w.dtype == torch.float64
    torch.testing.assert_close(w, expected, rtol=0, atol=5e-4)
    assert w[-1] == 4.4
    assert (PowerCosineGuidance(4.4, power=1).weight(t)[:-1] > w[:-1]).all()


def test_constant_and_interval() -> None:
    t = torch.tensor([0.1, 1.0, 2.0, 3.0, 3.1])
    assert ConstantGuidance(1.49).weight(t).tolist() == [1.49] * 5
    assert IntervalGuidance(2.0, 1.0, 3.0).weight(t).tolist() == [1, 2, 2, 2, 1]
    assert IntervalGuidance(2.0, 0, 3).weight(torch.arange(5)).tolist() == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("channels", [1, 3, 4, 9, "all"])
@pytest.mark.parametrize("seven", [0, 7])
def test_latent_is_its_formula(channels: Any, seven: int) -> None:
    """eps_0 + w (eps_y - eps_0) on the first channels; the rest and the variances pass through."""
    network, x = ToyLatent(), waves(seven, SHAPE)
    t = torch.tensor([3, 300, 470])
    guidance = PowerCosineGuidance(4.4, channels=channels)
    got = guided(network, LABELS, guidance)(x, t)
    conditional, unconditional = network(x, t, LABELS), network(x, t, torch.full((3,), 6))
    w = guidance.weight(t).view(-1, 1, 1, 1)
    k = 4 if channels == "all" else min(channels, 4)
    expected = unconditional + w * (conditional - unconditional)
    torch.testing.assert_close(got[:, :k], expected[:, :k], rtol=1e-12, atol=1e-12)
    assert torch.equal(got[:, k:], conditional[:, k:])


def test_only_samples_with_weight_are_evaluated_twice() -> None:
    """In one batch with the others."""
    network = ToyLatent()
    model = guided(network, LABELS, PowerCosineGuidance(4.4))
    x, t = waves(0, SHAPE), torch.tensor([999, 10, 800])
    got = model(x, t)
    assert network.batches == [4]
    assert (model.evaluations, model.saved) == (4, 2)
    plain = network(x, t, LABELS)
    assert torch.equal(got[[0, 2]], plain[[0, 2]])
    assert not torch.equal(got[1], plain[1])
    model(x, torch.full((3,), 999))
    assert network.batches[2:] == [3]
    assert (model.evaluations, model.saved) == (7, 5)


@pytest.mark.parametrize(
    ("guidance", "tolerance", "saved"),
    [
        (PowerCosineGuidance(4.4), 1e-4, 61),
        (PowerCosineGuidance(4.4), 1e-3, 81),
        (PowerCosineGuidance(4.4), 1e-2, 108),
        (PowerCosineGuidance(4.4), 0.0, 2),  # w is 1 to the last bit
        (ConstantGuidance(1.49), 1e-3, 0),
        (ConstantGuidance(1.0), 0.0, 250),
        (IntervalGuidance(2.0, 200, 700), 0.0, 125),
    ],
)
def test_saving(guidance: Guidance, tolerance: float, saved: int) -> None:
    """Of the 250 unconditional evaluations of a sample; docs/diffusion.md has this table."""
    model = guided(ToyLatent(), LABELS[:2], guidance, tolerance=tolerance)
    GaussianDiffusion(respacing=250).p_sample_loop(model, waves(0, (2, 4, 1, 1)))
    assert (model.evaluations, model.saved) == (2 * (500 - saved), 2 * saved)


def test_saving_changes_little() -> None:
    """A step by at most the tolerance times the difference of the halves."""
    network, x = ToyLatent(), waves(0, SHAPE)
    guidance, tolerance = PowerCosineGuidance(4.4), 1e-2
    for step in range(500, 1000, 50):
        t = torch.full((3,), step)
        got = guided(network, LABELS, guidance, tolerance=tolerance)(x, t)
        exact = guided(network, LABELS, guidance, tolerance=0)(x, t)
        difference = network(x, t, LABELS) - network(x, t, torch.full((3,), 6))
        assert ((got - exact).abs() <= tolerance * difference.abs() + 1e-12).all()


def test_denoiser_by_sigma() -> None:
    """The zero label is no class; the sampler still finds the denoiser's attributes."""
    denoiser = EDMDenoiser(ToyImage(), sigma_min=0.1, sigma_max=9.0)
    x, sigma = waves(0, (3, 2, 4, 4)).float(), torch.tensor([0.1, 1.0, 5.0]).double()
    labels = torch.tensor([0, 3, 2])
    model = guided(denoiser, labels, IntervalGuidance(2.5, 0.5, 6.0))
    got, conditional, unconditional = (
        model(x, sigma),
        denoiser(x, sigma, labels),
        denoiser(x, sigma),
    )
    assert model.evaluations == 5
    assert torch.equal(got[0], conditional[0])
    torch.testing.assert_close(got[1:], (unconditional + 2.5 * (conditional - unconditional))[1:])
    assert (model.sigma_min, model.sigma_max, model.label_dim) == (0.1, 9.0, 3)
    plain = guided(denoiser, labels, ConstantGuidance(1.0))
    expected = edm_sample(denoiser, x, class_labels=labels, num_steps=3)
    assert torch.equal(edm_sample(plain, x, num_steps=3), expected)
    assert (plain.evaluations, plain.saved) == (15, 15)
    rows = torch.eye(4, 3)[labels]
    assert torch.equal(guided(denoiser, rows, IntervalGuidance(2.5, 0.5, 6.0))(x, sigma), got)


def test_narrow_networks_are_guided_in_float32() -> None:
    network = ToyLatent(dtype=torch.bfloat16)
    x, t = waves(0, SHAPE).bfloat16(), torch.full((3,), 10)
    got = guided(network, LABELS, ConstantGuidance(3.0))(x, t)
    conditional = network(x, t, LABELS).float()
    unconditional = network(x, t, torch.full((3,), 6)).float()
    assert got.dtype == torch.float32
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(got[:, :3], expected[:, :3])


def test_pickles() -> None:
    model = guided(ToyLatent(), LABELS, ConstantGuidance(2.0))
    x, t = waves(0, SHAPE), torch.full((3,), 10)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, t), model(x, t))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 7]), ValueError, "class_labels: expected 0..5, or 6 for no class, got 7"),
        (torch.tensor([-1]), ValueError, "class_labels: expected 0..5, or 6 for no class, got -1"),
        (torch.tensor([1.0]), TypeError, "class_labels: expected integers, got torch.float32"),
        (torch.zeros(2, 6), ValueError, r"class_labels: expected \(B,\), integers, got shape"),
    ],
)
def test_wrong_labels(labels: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        guided(ToyLatent(), labels, ConstantGuidance(2.0))


def test_wrong_calls() -> None:
    model = guided(ToyLatent(), LABELS, ConstantGuidance(2.0))
    with pytest.raises(ValueError, match="x: expected 3 images, one for each of class_labels, got"):
        model(waves(0, (2, 4, 3, 5)), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="model: expected a network with classes to guide by"):
        guided(EDMDenoiser(ToyImage(label_dim=0)), LABELS, ConstantGuidance(2.0))
    with pytest.raises(ValueError, match="guidance: PowerCosineGuidance is a function of the time"):
        guided(EDMDenoiser(ToyImage()), LABELS, PowerCosineGuidance(2.0))
    with pytest.raises(ValueError, match="channels: expected a positive number or 'all', got 0"):
        guided(ToyLatent(), LABELS, ConstantGuidance(2.0, channels=0))
    with pytest.raises(ValueError, match="low: expected at most high = 1, got 2"):
        IntervalGuidance(3.0, 2, 1)
