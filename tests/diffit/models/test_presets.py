"""The presets: their sizes, counted again; their names; what the documentation says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffit.models import PRESETS, LatentDiffiT, create_model, get_preset, list_models
from diffit.models.ablations import ABLATIONS
from diffit.models.presets import MAIN

DOCS = Path(__file__).parents[3] / "docs" / "networks.md"


@pytest.mark.parametrize("name", PRESETS)
def test_sizes(name: str) -> None:
    """Parameters and multiply-adds of one evaluation, by PyTorch's counter, as printed."""
    with torch.device("meta"):
        network = create_model(name).eval()
        if isinstance(network, LatentDiffiT):
            x = torch.empty(1, 4, network.input_size, network.input_size)
            inputs = (x, torch.empty(1), torch.empty(1, dtype=torch.int64))
        else:
            x = torch.empty(1, 3, network.img_resolution, network.img_resolution)
            inputs = (x, torch.empty(1))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    got = f"{parameters / 1e6:.1f} M, {counter.get_total_flops() / 2e9:.1f} GFLOPs"
    assert got == f"{PRESETS[name].parameters} M, {PRESETS[name].gflops} GFLOPs"


def test_documentation() -> None:
    """Every row | `preset` | parameters | GFLOPs | FID |, and a row for every preset."""
    rows = re.findall(r"\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) \| ([\d.]+|-) \|", DOCS.read_text())
    assert len(rows) == DOCS.read_text().count("| `")
    assert {name for name, *_ in rows} == PRESETS.keys()
    for name, parameters, gflops, fid in rows:
        preset = PRESETS[name]
        expected = "-" if preset.fid is None else f"{preset.fid:.2f}"
        assert (parameters, gflops, fid) == (f"{preset.parameters}", f"{preset.gflops}", expected)


def test_listed_with_ablations_last() -> None:
    assert list_models() == [*MAIN, *ABLATIONS]
    assert list_models("*xl*") == ["diffit_xl_2_256", "diffit_xl_2_512"]
    assert list_models("nothing") == []


def test_unknown_names_the_nearest() -> None:
    for call in (get_preset, create_model):
        with pytest.raises(ValueError, match="no 'diffit_cifar_32'; the nearest is 'diffit_cifar1"):
            call("diffit_cifar_32")


def test_overrides() -> None:
    with torch.device("meta"):
        network = create_model("diffit_cifar10_32", label_dim=10)
        assert network.label_dim == 10
        assert network.augment_dim == PRESETS["diffit_cifar10_32"].options["augment_dim"] == 9
        with pytest.raises(TypeError, match="colour"):
            create_model("diffit_cifar10_32", colour="red")
