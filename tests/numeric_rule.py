"""The numeric rule: at most twice the error of plain PyTorch in the same dtype, plus 1e-6.

Both errors are the largest absolute difference from float64 on the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def assert_numeric_rule(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> None:
    """Every output of ``truth`` is in ``got`` and keeps the rule; a NaN anywhere breaks it."""
    assert got.keys() == plain.keys() == truth.keys()
    broken = []
    for name, exact in truth.items():
        assert got[name].shape == exact.shape, name
        assert got[name].dtype == plain[name].dtype, name
        error = _error(got[name], exact)
        allowed = 2 * _error(plain[name], exact) + 1e-6
        if not error <= allowed:
            broken.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
    assert not broken, "; ".join(broken)


def _error(tensor: Tensor, exact: Tensor) -> float:
    return (tensor.double() - exact).abs().max().item()
