"""The C interface of ``csrc/cuda``: a struct, and functions that return an error or nothing."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import ClassVar

# The library stands beside this package and is named like an extension module, but is none: it
# needs neither Python nor torch.
_FOLDER = Path(__file__).parents[1]


class Problem(ctypes.Structure):
    """``diffit::cuda::WindowAttention`` of ``csrc/cuda/problem.h``: the same fields in order."""

    _fields_: ClassVar = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("batch", "grid_height", "grid_width", "window_height", "window_width"),
                *("heads", "head_dim", "dtype", "blocks"),
            )
        ),
        ("scale", ctypes.c_double),
        ("qkv", ctypes.c_void_p),
        ("qkv_stride_batch", ctypes.c_int64),
        ("qkv_stride_token", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("table_stride_row", ctypes.c_int64),
        ("table_stride_head", ctypes.c_int64),
        ("q_row", ctypes.c_void_p),
        ("v_row", ctypes.c_void_p),
        ("row_stride_batch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        ("grad_out", ctypes.c_void_p),
        ("grad_out_stride_batch", ctypes.c_int64),
        ("grad_out_stride_token", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("grad_qkv", "grad_table", "grad_q_row", "grad_v_row", "workspace")
        ),
        ("_windows", ctypes.c_int64),
        ("_windows_across", ctypes.c_int64),
        ("_splits", ctypes.c_int64),
        ("_steps", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("_weight", "_delta", "_q", "_table_part", "_q_part", "_v_part")
        ),
    ]


class Library:
    """The compiled library at ``path``.

    Raises:
        OSError: it cannot be loaded, or is not of this version.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.diffit_problem_size.restype = ctypes.c_int64
        if library.diffit_problem_size() != ctypes.sizeof(Problem):
            raise OSError(f"{path} is of another version")
        try:
            self._unavailable = library.diffit_unavailable
            self._workspace_size = library.diffit_workspace_size
            self._shared_bytes = library.diffit_shared_bytes
            self._forward = library.diffit_window_attention
            self._backward = library.diffit_window_attention_backward
        except AttributeError as error:
            raise OSError(f"{path} is of another version: {error}") from None
        self._unavailable.restype = ctypes.c_char_p
        for function in (self._workspace_size, self._shared_bytes):
            function.argtypes = [ctypes.POINTER(Problem)]
            function.restype = ctypes.c_int64
        for function in (self._forward, self._backward):
            function.argtypes = [ctypes.POINTER(Problem), ctypes.c_void_p]
            function.restype = ctypes.c_char_p

    def unavailable(self) -> str | None:
        """Why the driver or the current device cannot run the kernels, or None."""
        error: bytes | None = self._unavailable()
        return None if error is None else f"the kernels cannot run: {error.decode()}"

    def workspace_size(self, problem: Problem) -> int:
        """Numbers of float32 that the backward pass needs as ``workspace``."""
        return self._workspace_size(problem)

    def shared_bytes(self, problem: Problem) -> int:
        """Bytes of shared memory that a block needs, forward and backward."""
        return self._shared_bytes(problem)

    def window_attention(self, problem: Problem, stream: int) -> None:
        """Launch the forward kernels on a stream; RuntimeError where a launch fails."""
        _raise(self._forward(problem, stream))

    def window_attention_backward(self, problem: Problem, stream: int) -> None:
        """Launch the backward kernels on a stream; RuntimeError where a launch fails."""
        _raise(self._backward(problem, stream))


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(f"window_attention: {error.decode()}")


def load() -> Library | str:
    """The library of this installation, or the reason why there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = _FOLDER / f"_cuda{suffix}"
        if path.exists():
            try:
                return Library(path)
            except OSError as error:
                return f"the CUDA C++ kernels could not be loaded ({error}); reinstall"
    return (
        "the CUDA C++ kernels were not built; reinstall with nvcc on the path "
        "(DIFFIT_BUILD_CUDA=1 says what fails)"
    )
