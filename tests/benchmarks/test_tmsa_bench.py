"""The command line of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tmsa_bench
from diffit_kernels import products
from results import OK, SKIPPED, read

ONE = ["--quick", "--shapes", "cifar10-8", "--dtypes", "float32", "--ops", "attention"]
WRONG = {
    "unknown option": ["--fast"],
    "unknown shape": ["--shapes", "cifar100"],
    "no shape": ["--shapes"],
    "unknown dtype": ["--dtypes", "int8"],
    "unknown operation": ["--ops", "conv"],
    "unknown pass": ["--passes", "sideways"],
    "no threads": ["--threads", "0"],
    "threads in words": ["--threads", "two"],
    "no GPU": ["--device", "cuda"],
    "time in words": ["--compile-seconds", "long"],
    "folder is a file": ["--out", __file__],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_input_costs_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        tmsa_bench.main(arguments)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tmsa_bench.py: ")
    assert err.count("\n") == 1


def test_missing_pictures_cost_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tmsa_bench, "PICTURES", Path("nowhere.zip"))
    with pytest.raises(SystemExit) as exit_:
        tmsa_bench.main([])
    assert exit_.value.code == 2
    assert "nowhere.zip" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["fastest", "cuda"])
def test_a_backend_that_cannot_run_costs_one_line(
    backend: str,
    capsys: pytest.CaptureFixture[str],
    environment_names: Callable[[str], None],
) -> None:
    environment_names(backend)
    with pytest.raises(SystemExit) as exit_:
        tmsa_bench.main(["--quick"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert backend in err


def test_interrupt_costs_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tmsa_bench.ceilings, "measure", interrupt)
    assert tmsa_bench.main(["--quick", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_run(
    backend: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    environment_names: Callable[[str], None],
) -> None:
    environment_names(backend)
    assert tmsa_bench.main([*ONE, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    run, rows = read(tmp_path)
    assert ("OURS IS THE REFERENCE" in out) == (run["device"]["ours"] == "reference")
    if backend == "reference":
        assert run["device"]["ours"] == "reference"
    expected = {"ours": OK, "eager": OK, "sdpa": OK}
    expected |= dict.fromkeys(("compile", "compile-sdpa", "flex"), SKIPPED)
    for direction in ("forward", "backward"):
        statuses = {row.contestant: row.status for row in rows if row.direction == direction}
        assert statuses == expected
    assert "geometric mean" in out
    assert (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("native", [True, False])
def test_dtypes_without_products_are_left_out(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_NATIVE", {torch.bfloat16: native})
    expected = ["float32", "bfloat16"] if native else ["float32"]
    assert tmsa_bench.default_dtypes(torch.device("cpu")) == expected
    assert tmsa_bench.parse(["--quick", "--dtypes", "bfloat16"]).dtypes == ["bfloat16"]
