"""What is chosen, what is dropped, and when it ends; the kernels run in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import diffit_kernels as dk
from diffit.models.presets import MAIN
from diffit_kernels import reference
from diffit_kernels import triton as backend
from diffit_kernels.triton.configs import CUBLASLT, Config, Table, choose, read

pytest.importorskip("triton")

from diffit_kernels.tune import search
from diffit_kernels.tune.layers import KERNELS, LAYERS, Layer, candidates
from diffit_kernels.tune.passes import Pass, passes
from diffit_kernels.tune.search import Budget, Search

CPU = torch.device("cpu")
# Enough numbers in every result that its largest error is no luck.
SMALL = Layer(4, 4, 2, 2, 16)
LARGE = Layer(2, 9, 9, 1, 64)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """On the CPU, whether or not there is a GPU: the timer is not real."""
    if not backend._interpreted:
        pytest.skip("TRITON_INTERPRET is not set")
    with dk.use_backend("triton"):
        yield


class Machine:
    """Counts what it compiles, and takes times and spills from functions of the parameters."""

    device = CPU

    def __init__(
        self,
        seconds: Callable[[Config], float] = lambda config: 1.0,
        spills: Callable[[Config], int] = lambda config: 0,
    ) -> None:
        self.seconds, self._spills = seconds, spills
        self.compiled = 0

    def compile(self, calls: Sequence[partial[Any]]) -> None:
        self.compiled += len(calls)

    def spills(self, call: partial[Any]) -> int:
        call()
        return sum(map(self._spills, self._configs(call)))

    def times(self, calls: Sequence[partial[Any]]) -> list[float]:
        return [sum(map(self.seconds, self._configs(call))) for call in calls]

    def _configs(self, call: partial[Any]) -> list[Config]:
        """The CUDA C++ kernels have none."""
        return list(call.keywords.get("configs", {"cuda": {"cuda": True}}).values())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.json"


def run(
    machine: Machine,
    path: Path,
    kernels: Sequence[str] = ("add_layer_norm",),
    layers: Sequence[Layer] = (SMALL,),
    table: Table | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[bool, list[str]]:
    """Whether there was time, and the lines of the report."""
    lines: list[str] = []
    budget = options.pop("budget", None) or Budget(1e9)
    table = table or Table(["H200"])
    done = Search(machine, path, table, kernels, budget, lines.append).run(layers, [dtype])
    return done, lines


def rows(count: int) -> Config:
    return {"ROWS": count, "num_warps": 4}


KNOWN = choose("add_layer_norm", CPU, 4, rows=64, features=32)


def entries(path: Path) -> dict[str, Config]:
    return {entry["kernel"]: entry["parameters"] for entry in read(path).entries}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles: the interpreter takes its time over each."""
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16}
    few = {
        "small_forward": [{"WINDOWS": 2}, {"WINDOWS": 4}],
        "small_backward": [{"WINDOWS": 2}],
        "large_forward": [tiles],
        "mlp_gelu": [{**tiles, "BLOCK_K": 16, "GROUP": 2}, CUBLASLT],
        "mlp_bias": [CUBLASLT],
        "add_layer_norm": [rows(2), rows(8), rows(4)],
    }
    monkeypatch.setattr(search, "candidates", lambda kernel, itemsize: few.get(kernel, []))


@pytest.mark.parametrize(
    ("operator", "layer"),
    [*((operator, SMALL) for operator in KERNELS), ("window_attention", LARGE)],
    ids=["attention-small", "mlp", "norm", "attention-large"],
)
def test_passes_are_right_and_what_is_not_is_seen(operator: str, layer: Layer) -> None:
    dtype = torch.float16 if operator == "mlp" else torch.float32
    kernels = set()
    for work in passes(operator, layer, dtype, CPU):
        configs = {
            kernel: choose(kernel, CPU, dtype.itemsize, **shape)
            for kernel, shape in work.kernels.items()
        }
        results = work.run(configs=configs)
        assert work.is_right(results)
        for index, result in enumerate(results):
            fault = 0.1 if dtype == torch.float16 else 1e-3
            for broken in (result + fault, result.clone().fill_(torch.nan)):
                assert not work.is_right((*results[:index], broken, *results[index + 1 :]))
        kernels |= work.kernels.keys()
    other = {"small": "large_", "large": "small_"}["small" if layer is SMALL else "large"]
    elsewhere = ("cuda", "small_forward_in_parts", "large_forward_in_parts")  # on a GPU
    assert kernels == {
        k for k in KERNELS[operator] if k not in elsewhere and not k.startswith(other)
    }


def test_the_fastest_is_kept(path: Path) -> None:
    machine = Machine(lambda config: {8: 1e-6}.get(config["ROWS"], 3e-6))
    done, (line,) = run(machine, path)
    assert done
    assert entries(path) == {"add_layer_norm": rows(8)}
    assert read(path).devices == ["H200"]
    assert read(path).entries[0] == {
        "kernel": "add_layer_norm",
        "itemsize": 4,
        "rows": 64,
        "features": 32,
        "parameters": rows(8),
    }
    assert "1.0 us, 3.00x (4 of 4 compared)" in line
    assert machine.compiled == 4


def test_float32_is_in_parts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass of a small window; without TF32 its gradient is not."""
    attention = import_module("diffit_kernels.triton.attention")
    monkeypatch.setattr(attention, "knobs", Mock(**{"runtime.interpret": False}))
    work = next(iter(passes("window_attention", SMALL, torch.float32, CPU)))
    assert work.kernels.keys() == {"small_forward_in_parts"}
    assert attention.named("small_backward", work.problem, CPU) == "small_backward"


def test_the_known_stays_where_nothing_is_faster(path: Path) -> None:
    run(Machine(lambda config: 1.0 if config == KNOWN else 1.1), path)
    assert entries(path) == {"add_layer_norm": KNOWN}


def test_what_spills_is_dropped(path: Path) -> None:
    machine = Machine(lambda config: config["ROWS"], lambda config: int(config["ROWS"] < 8))
    _, (line,) = run(machine, path)
    assert entries(path) == {"add_layer_norm": rows(8)}
    assert "(2 of 4 compared)" in line


@pytest.mark.parametrize("fault", ["does not compile", "wrong", "NaN"])
def test_what_fails_or_breaks_the_rule_is_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The fastest of all."""
    original = backend.add_layer_norm

    def broken(*arguments: Any, configs: Any = None) -> Any:
        s, n = original(*arguments, configs=configs)
        if configs == {"add_layer_norm": rows(2)}:
            if fault == "does not compile":
                raise RuntimeError("out of resources")
            s[0, 0] = torch.nan if fault == "NaN" else s[0, 0] + 1e-4
        return s, n

    monkeypatch.setattr(backend, "add_layer_norm", broken)
    _, (line,) = run(Machine(lambda config: config["ROWS"]), path)
    assert entries(path) == {"add_layer_norm": rows(4)}
    assert "(3 of 4 compared)" in line


def test_where_nothing_is_right_there_is_no_entry(path: Path) -> None:
    _, lines = run(Machine(spills=lambda config: 1), path)
    assert not path.exists()
    assert "none of 4 candidates is right" in lines[0]


def test_cublaslt_has_to_be_right_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another function in the place of GELU only the second product is right."""

    def relu(bias: torch.Tensor, *factors: torch.Tensor, use_gelu: bool) -> torch.Tensor:
        return torch.addmm(bias, *factors).relu()

    monkeypatch.setattr(torch, "_addmm_activation", relu)
    machine = Machine(lambda config: float(config != CUBLASLT))
    run(machine, path, KERNELS["mlp"], dtype=torch.float16)
    assert entries(path)["mlp_bias"] == CUBLASLT
    assert entries(path)["mlp_gelu"] != CUBLASLT
    assert entries(path).keys() == set(KERNELS["mlp"])


def test_products_in_float32_are_not_tuned(path: Path) -> None:
    assert run(Machine(), path, KERNELS["mlp"]) == (True, [])
    assert not path.exists()


def test_every_kernel_once(path: Path) -> None:
    """Layers share attention; the table has what was asked for."""
    kernels = ("small_forward", "small_backward", "add_layer_norm")
    wider = Layer(4, 4, 2, 4, 16)
    _, lines = run(Machine(), path, kernels, [SMALL, wider])
    assert [entry["kernel"] for entry in read(path).entries] == [*kernels, "add_layer_norm"]
    assert len(lines) == 4


def test_other_entries_of_the_table_stay(path: Path) -> None:
    old = {"kernel": "add_layer_norm", "itemsize": 4, "rows": 64, "features": 32}
    other = old | {"rows": 128, "parameters": rows(2)}
    table = Table(["H200"], [], [old | {"parameters": rows(2)}, other])
    run(Machine(lambda config: -config["ROWS"]), path, table=table)
    assert read(path).entries == [old | {"parameters": rows(8)}, other]


def test_ends_in_time_with_what_there_is(path: Path) -> None:
    """A step takes 10 of 25 seconds, so the third is not begun; each is written when it ends."""
    now = [0.0]
    written = []

    class Slow(Machine):
        def times(self, calls: Sequence[partial[Any]]) -> list[float]:
            written.append(len(read(path).entries) if path.exists() else 0)
            now[0] += 10
            return super().times(calls)

    done, lines = run(
        Slow(),
        path,
        [k for names in KERNELS.values() for k in names],
        budget=Budget(25, lambda: now[0]),
    )
    assert not done
    assert written == [0, 1]
    assert entries(path).keys() == {"small_forward", "small_backward"}
    assert len(lines) == 2


def test_a_layer_that_is_too_large_is_passed_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(operator: str, layer: Layer, *others: Any) -> Iterator[Pass]:
        if layer is LARGE:
            raise torch.OutOfMemoryError
        return passes(operator, layer, *others)

    monkeypatch.setattr(search, "passes", too_large)
    done, lines = run(Machine(), path, layers=[LARGE, SMALL])
    assert done
    assert "too large" in lines[0]
    assert entries(path).keys() == {"add_layer_norm"}


@pytest.mark.parametrize(
    ("seconds", "listed"),
    [
        ((0.5, 0.5), True),
        ((0.5, 1.6), False),  # not together
        ((1.05, 0.5), True),  # hardly slower forward
        ((1.5, 0.1), False),  # not forward
    ],
)
def test_cuda_where_it_is_faster(
    path: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], listed: bool
) -> None:
    rival = SimpleNamespace(
        unavailable=lambda: None,
        supports=lambda problem: None,
        window_attention=reference.window_attention,
        window_attention_backward=reference.window_attention_backward,
    )
    monkeypatch.setattr(search, "cuda", rival)
    remaining = list(seconds)
    machine = Machine(lambda config: remaining.pop(0) if "cuda" in config else 1.0)
    for before in ([], [[4, 16], [256, 72]]):
        remaining[:] = seconds
        table = Table(["H200"], list(before))
        run(machine, path, ["cuda"], table=table)
        others = [shape for shape in before if shape != [4, 16]]
        assert read(path).cuda_is_faster == [[4, 16]] * listed + others


def test_cuda_is_not_compared_where_it_cannot_run(path: Path) -> None:
    assert run(Machine(), path, ["cuda"]) == (True, [])
    assert not path.exists()


def test_the_layers_are_those_of_the_networks() -> None:
    """Every window and head width of a preset is tuned."""
    tuned = {(layer.window, layer.head_dim) for layer in LAYERS}
    for name, preset in MAIN.items():
        with torch.device("meta"):
            network = preset.network(**preset.options)
        blocks = [
            m for m in network.modules() if hasattr(m, "window_size") and hasattr(m, "num_heads")
        ]
        assert blocks
        for attn in blocks:
            key = (attn.window_size[0], attn.dim // attn.num_heads)
            assert key in tuned, (name, key)


@pytest.mark.parametrize(
    ("kernel", "itemsize"),
    [
        (kernel, itemsize)
        for operator, names in KERNELS.items()
        for kernel in names
        if kernel != "cuda"
        for itemsize in ((2,) if operator == "mlp" else (4,) if "parts" in kernel else (2, 4))
    ],
)
def test_candidates_name_what_the_default_names(kernel: str, itemsize: int) -> None:
    shape = {"window_tokens": 64, "head_dim": 32}
    if kernel.startswith(("mlp", "add")):
        shape = {"rows": 64, "features": 32}
    known = choose(kernel, CPU, itemsize, **shape)
    tried = candidates(kernel, itemsize)
    assert len(tried) > 3
    assert all(config.keys() == known.keys() for config in tried if config != CUBLASLT)
    assert len({str(config) for config in tried}) == len(tried)
