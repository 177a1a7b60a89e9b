"""The tests' own tools: a check that could not fail would show nothing."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import diffit_kernels as dk
from diffit_kernels.native import library
from tests.cases import AttentionCase, MLPCase
from tests.numeric_rule import assert_numeric_rule


class _Idle:
    """A compiled module whose kernels write nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def test_an_output_that_no_kernel_wrote_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "kernels", _Idle())
    monkeypatch.setattr(library, "_import_error", None)
    with dk.use_backend("cpu"):
        attention, mlp = AttentionCase((3, 5), 24).operator(), MLPCase((3, 8), 8, 8).operator()
    for name in ("out", "lse", "grad_qkv", "grad_rel_pos_table"):
        assert attention[name].isnan().all(), name
    for name in ("y", "grad_fc1_bias", "grad_fc2_weight"):
        assert mlp[name].isnan().all(), name


def test_the_rule_sees_a_wrong_number_and_a_nan() -> None:
    exact = torch.ones(100, dtype=torch.float64)
    plain = exact.float() + 1e-3
    assert_numeric_rule({"y": exact.float() + 2e-3}, {"y": plain}, {"y": exact})
    for wrong in (1.0022, torch.nan, torch.inf):
        got = exact.float()
        got[7] = wrong
        with pytest.raises(AssertionError, match="y: error"):
            assert_numeric_rule({"y": got}, {"y": plain}, {"y": exact})


@pytest.mark.skipif("CI" not in os.environ, reason="a checkout may lack the compiled module")
def test_the_compiled_module_is_there() -> None:
    assert dk.available_backends()["cpu"] is None


@pytest.mark.skipif("CI" not in os.environ, reason="a machine may lack Triton")
def test_the_triton_kernels_are_there() -> None:
    assert dk.available_backends()["triton"] is None
