"""The CUDA C++ kernels of ``csrc/cuda``, as a backend.

They are kernels of windowed attention in bfloat16 and float16. The other operators are Triton's, so
that a whole network runs under ``use_backend("cuda")``.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from diffit_kernels import triton
from diffit_kernels.cuda.library import Library, Problem, load
from diffit_kernels.layout import equally_spaced
from diffit_kernels.problem import Problem as AnyProblem
from diffit_kernels.problem import WindowAttentionProblem
from diffit_kernels.triton.configs import table_of

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}

_MAX_WINDOW_TOKENS = 1024
# Tokens of a sample, and numbers from token to token: the kernels count in 32 bits.
_MAX_COUNT = 2**30

# Tokens of a window up to which a table is read as it lies, heads side by side: to rewrite it is a
# launch more.
_SCATTERED_TABLE = 256

# Blocks that keep any GPU busy, where work may be cut at will. The same on every device, so that
# the sums are.
_BLOCKS = 1024

# The emulator of the tests takes the place of the library, and of the device.
_library: Library | str = load()
_device_type = "cuda"


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if isinstance(_library, str):
        return _library
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device, or no driver for it"
    if reason := triton.too_old() or _library.unavailable():
        return reason
    return None


def supports(problem: AnyProblem) -> str | None:
    """Why the kernels cannot run this problem, or None."""
    if not isinstance(problem, WindowAttentionProblem):
        return triton.unavailable() or triton.supports(problem)
    if problem.device_type != _device_type:
        return f"the tensors are on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return f"{problem.dtype} is not one of bfloat16, float16"
    if problem.head_dim % 8 or not 8 <= problem.head_dim <= 128:
        return f"head width {problem.head_dim} is not a multiple of 8 from 8 to 128"
    if problem.window_tokens > _MAX_WINDOW_TOKENS:
        return f"window {problem.window_size} has more than {_MAX_WINDOW_TOKENS} tokens"
    if problem.tokens >= _MAX_COUNT:
        return f"grid {problem.grid_size} has 2^30 tokens or more"
    if (needed := _shared_bytes(problem.window_size, problem.head_dim)) > _shared_limit():
        return f"it needs {needed} bytes of shared memory, and the device gives {_shared_limit()}"
    return None


@lru_cache(maxsize=1024)
def _shared_bytes(window_size: tuple[int, int], head_dim: int) -> int:
    """What a block needs of shared memory, forward and backward, whichever is more."""
    return _loaded().shared_bytes(
        Problem(1, *window_size, *window_size, heads=1, head_dim=head_dim, dtype=1, blocks=1)
    )


@cache
def _shared_limit() -> int:
    """What a block may have of it on the current device, which stands for all."""
    properties: Any = torch.cuda.get_device_properties()  # PyTorch's stubs do not know the number
    return properties.shared_memory_per_block_optin


def is_faster(problem: AnyProblem) -> bool:
    """Whether these kernels were measured to be faster than Triton's, both passes together.

    The table of the current device, which stands for all, lists (window tokens, head width) of such
    layers.
    """
    if not isinstance(problem, WindowAttentionProblem) or unavailable():
        return False
    faster = table_of(torch.device("cuda")).cuda_is_faster
    return [problem.window_tokens, problem.head_dim] in faster


def __getattr__(name: str) -> Any:
    """The other operators, from Triton."""
    return getattr(triton, name)


def window_attention(
    problem: WindowAttentionProblem,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    qkv, (q_row, v_row, row_stride) = _aligned(qkv), _rows(q_row, v_row)
    table = _table(problem, rel_pos_table)
    out = qkv.new_empty(problem.batch, problem.tokens, problem.dim)
    lse = qkv.new_empty(problem.batch, problem.num_heads, problem.tokens, dtype=torch.float32)
    library = _loaded()
    with torch.cuda.device_of(qkv):
        arguments = _arguments(problem, scale, qkv, table, q_row, v_row, row_stride, lse)
        arguments.out = out.data_ptr()
        library.window_attention(arguments, _stream(qkv))
    return out, lse


def window_attention_backward(
    problem: WindowAttentionProblem,
    grad_out: Tensor,
    qkv: Tensor,
    rel_pos_table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As the reference."""
    qkv, grad_out, lse = _aligned(qkv), _aligned(grad_out), lse.contiguous()
    q_row, v_row, row_stride = _rows(q_row, v_row)
    table = _table(problem, rel_pos_table)
    grad_qkv = qkv.new_empty(problem.batch, problem.tokens, 3 * problem.dim)
    grad_table, grad_q_row, grad_v_row = (
        None if x is None else x.new_empty(x.shape) for x in (rel_pos_table, q_row, v_row)
    )
    library = _loaded()
    with torch.cuda.device_of(qkv):
        arguments = _arguments(problem, scale, qkv, table, q_row, v_row, row_stride, lse)
        arguments.grad_out = grad_out.data_ptr()
        arguments.grad_out_stride_batch, arguments.grad_out_stride_token, _ = grad_out.stride()
        arguments.grad_qkv = grad_qkv.data_ptr()
        arguments.grad_table = _pointer(grad_table)
        arguments.grad_q_row = _pointer(grad_q_row)
        arguments.grad_v_row = _pointer(grad_v_row)
        workspace = lse.new_empty(library.workspace_size(arguments))
        arguments.workspace = workspace.data_ptr()
        library.window_attention_backward(arguments, _stream(qkv))
    return grad_qkv, grad_table, grad_q_row, grad_v_row


def _loaded() -> Library:
    assert isinstance(_library, Library)  # the table of backends asked `unavailable`
    return _library


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _arguments(
    problem: WindowAttentionProblem,
    scale: float,
    qkv: Tensor,
    table: Tensor | None,
    q_row: Tensor | None,
    v_row: Tensor | None,
    row_stride: int,
    lse: Tensor,
) -> Problem:
    return Problem(
        *(problem.batch, *problem.grid_size, *problem.window_size),
        *(problem.num_heads, problem.head_dim, _DTYPES[problem.dtype], _BLOCKS, scale),
        *(qkv.data_ptr(), qkv.stride(0), qkv.stride(1)),
        *(_pointer(table), *((0, 0) if table is None else table.stride())),
        *(_pointer(q_row), _pointer(v_row), row_stride),
        lse=lse.data_ptr(),
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _aligned(x: Tensor) -> Tensor:
    """(..., C) whose rows are whole units of 16 bytes: as it is, or a copy."""
    unit = 16 // x.itemsize
    *strides, last = x.stride()
    fit = last == 1 and strides[-1] < _MAX_COUNT and not any(s % unit for s in strides)
    if fit and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _rows(q_row: Tensor | None, v_row: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """The same of rows (B, C), and how far apart they lie."""
    q_row, v_row = (None if row is None else _aligned(row) for row in (q_row, v_row))
    return equally_spaced(q_row, v_row)


def _table(problem: WindowAttentionProblem, table: Tensor | None) -> Tensor | None:
    """(rows, heads), with the rows of a head side by side where blocks have many to read."""
    if table is None or problem.window_tokens <= _SCATTERED_TABLE:
        return table
    return table.t().contiguous().t()
