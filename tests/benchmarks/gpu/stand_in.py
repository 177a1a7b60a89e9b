"""The reference in the place of our GPU backends, so that the parts run on the CPU."""

from __future__ import annotations

from types import ModuleType

import pytest

from diffit_kernels import dispatch, reference


def stand_in(
    monkeypatch: pytest.MonkeyPatch,
    triton: ModuleType | str = reference,
    cuda: ModuleType | str = reference,
) -> None:
    """Each is the reference, or another module, or the reason why there is none."""
    monkeypatch.setitem(dispatch._BACKENDS, "triton", triton)
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", cuda)


def wrong() -> ModuleType:
    """The reference with every output of attention a hundredth too large."""
    module = ModuleType("wrong")
    vars(module).update(vars(reference))

    def window_attention(*arguments: object) -> object:
        out, lse = reference.window_attention(*arguments)
        return 1.01 * out, lse

    module.window_attention = window_attention
    return module
