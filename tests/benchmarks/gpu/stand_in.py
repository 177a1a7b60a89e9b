"""The reference in the place of our GPU backends, so that the parts run on the CPU."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from diffit_kernels import dispatch, reference


def stand_in(
    monkeypatch: pytest.MonkeyPatch, cuda: ModuleType | SimpleNamespace = reference
) -> None:
    """``triton`` is the reference, and ``cuda`` it too or another."""
    monkeypatch.setitem(dispatch._BACKENDS, "triton", reference)
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", cuda)


def wrong() -> SimpleNamespace:
    """The reference with every output of attention a hundredth too large."""
    module = SimpleNamespace(**vars(reference), __name__="wrong")

    def window_attention(*arguments: object) -> object:
        out, lse = reference.window_attention(*arguments)
        return 1.01 * out, lse

    module.window_attention = window_attention
    return module
