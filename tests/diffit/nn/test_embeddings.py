"""Embeddings against their formulas, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from diffit.nn.embeddings import (
    FourierEmbedding,
    LabelEmbedder,
    NoiseEmbedder,
    TimestepEmbedder,
    sincos_positions,
    sinusoidal_embedding,
)


def test_sinusoidal() -> None:
    """256 numbers: the cosines of t * exp(-ln(10000) k / 128), then the sines."""
    t = torch.tensor([0.0, 1.0, 417.5, 999.0])
    got = sinusoidal_embedding(t, 256)
    assert got.dtype == torch.float32
    for row, time in zip(got, t.tolist(), strict=True):
        for k in (0, 1, 63, 127):
            angle = time * math.exp(-math.log(10000) * k / 128)
            # float32 angles are rounded to their last bit.
            assert row[k].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert row[128 + k].item() == pytest.approx(math.sin(angle), abs=2e-4)


def test_integer_times_count_as_numbers() -> None:
    t = torch.tensor([3, 700])
    assert torch.equal(sinusoidal_embedding(t, 64), sinusoidal_embedding(t.double(), 64))


def test_positions() -> None:
    """First half from x, second from y, each [sin, cos] of pos * 10000 ** (-k / (C / 4))."""
    got = sincos_positions(3, 16).unflatten(0, (3, 3))
    for y in range(3):
        for x in range(3):
            for half, position in enumerate((x, y)):
                for k in range(4):
                    angle = position * 10000 ** (-k / 4)
                    assert got[y, x, 8 * half + k].item() == pytest.approx(math.sin(angle))
                    assert got[y, x, 8 * half + 4 + k].item() == pytest.approx(math.cos(angle))


def test_fourier() -> None:
    torch.manual_seed(0)
    embedding = FourierEmbedding(4000)
    f = embedding.frequencies
    assert f.std().item() == pytest.approx(16, rel=0.05)
    t = torch.tensor([0.3, -1.2])
    angles = 2 * math.pi * t.double()[:, None] * f.double()
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert (embedding(t) - expected).abs().max() < 1e-3  # angles of hundreds, in float32
    assert "frequencies" in embedding.state_dict()


def test_timestep_embedder_keeps_float32_angles() -> None:
    """In bfloat16 weights too: 999 and 1000 are one number in bfloat16."""
    embedder = TimestepEmbedder(8).bfloat16()
    a, b = embedder(torch.tensor([997.0, 999.0]))
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)


def test_label_embedder() -> None:
    embedder = LabelEmbedder(3, 4, dropout=0.25)
    labels = torch.arange(3).repeat(2000)
    table = embedder.embedding_table.weight
    assert torch.equal(embedder.eval()(labels), table[labels])
    torch.manual_seed(0)
    dropped = (embedder.train()(labels) == table[3]).all(dim=1)
    # 6000 draws of probability 1/4: five deviations.
    assert abs(dropped.float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 6000) ** 0.5


def test_noise_embedder_drops_labels_of_single_pictures() -> None:
    torch.manual_seed(0)
    embedder = NoiseEmbedder(
        8, 4, label_dim=3, augment_dim=0, label_dropout=0.25, fourier=False
    ).train()
    noise, labels = torch.zeros(6000), torch.eye(3)[torch.zeros(6000, dtype=torch.int64)]
    dropped = (embedder(noise, labels, None) == embedder(noise, None, None)).all(dim=1)
    assert abs(dropped.float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 6000) ** 0.5
