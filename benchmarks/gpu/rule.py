"""The numeric rule on the device, every operator: errors as a share of what is allowed.

Truth (float64) and plain PyTorch run on the same device, with TF32 where the operator has it.
Memory that nobody wrote is NaN. The cases run side by side in several workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from diffit_kernels import tmsa, use_backend
from gpu import workers
from gpu.job import Job, Result
from gpu.precision import PRECISIONS, using
from harness import errors, worst_error
from results import FAILED, OK

# The first has nothing to compile, so all its cases are done in seconds.
BACKENDS = {"cuda": ("bfloat16", "float16"), "triton": tuple(PRECISIONS)}
# (window, grid in windows) and head widths; those of the networks come first.
WINDOWS = {(4, 4): (1, 3), (8, 8): (2, 1), (16, 16): (1, 1), (32, 32): (1, 1)}
WIDTHS = (32, 72)
ODD_WINDOWS = {(1, 1): (3, 3), (3, 5): (3, 2), (7, 7): (1, 2)}
ODD_WIDTHS = (8, 40, 64, 80, 128)
TASK_SECONDS = 60.0
WORKERS = 12

EMPTY: dict[str, Any] = {"status": OK, "error_over_allowed": None, "where": "", "reason": ""}

Tensors = dict[str, Tensor]


def tasks(allowed: Collection[str] = tuple(PRECISIONS)) -> Iterator[dict[str, Any]]:
    """All cases of a backend and then of the next, the layers of the networks first."""
    networks = list(product(WINDOWS.items(), WIDTHS))
    odd = [
        (window, width)
        for window, width in product((WINDOWS | ODD_WINDOWS).items(), WIDTHS + ODD_WIDTHS)
        if (window, width) not in networks
    ]
    hard: list[dict[str, Any]] = [{"scale": 50.0}, {"scale": -1.0}, {"constant": True}]
    by_operator: list[tuple[str, list[dict[str, Any]]]] = [
        ("window_attention", [_attention(*shape) for shape in networks]),
        ("tmsa", [{"window": (3, 5), "head_dim": 24}, {"window": (8, 8), "head_dim": 72}]),
        (
            "mlp",
            [{"shape": s, "hidden": 4 * s[-1], "out": s[-1]} for s in ((300, 128), (77, 1152))],
        ),
        ("mlp", [{"shape": (129, 40), "hidden": 127, "out": 33, "spread": 12.0}]),
        ("add_layer_norm", [{"shape": s} for s in ((300, 128), (77, 1152), (5, 7, 33))]),
        ("add_layer_norm", [{"shape": (65, 256), "offset": 100.0}]),
        ("layer_norm", [{"shape": s} for s in ((300, 128), (77, 1152), (5, 7, 33))]),
        ("layer_norm", [{"shape": (65, 256), "offset": 100.0}]),
        ("window_attention", [_attention(*shape) | how for shape in networks for how in hard]),
        ("window_attention", [_attention(*shape) for shape in odd]),
    ]
    for (backend, precisions), (operator, cases) in product(BACKENDS.items(), by_operator):
        if backend == "cuda" and operator in ("mlp", "add_layer_norm", "layer_norm"):
            continue  # they are Triton's there
        for case, precision in product(cases, [p for p in precisions if p in allowed]):
            yield {
                "operator": operator,
                "backend": backend,
                "precision": precision,
                "case": case,
            }


def _attention(window: tuple[tuple[int, int], tuple[int, int]], head_dim: int) -> dict[str, Any]:
    shape, windows = window
    return {"window": shape, "head_dim": head_dim, "windows": windows}


def measure(
    task: dict[str, Any], device: torch.device, say: Callable[[str], None] = lambda at: None
) -> Result:
    """The row of one case: the largest error over what is allowed, and where it is."""
    row = task | EMPTY
    say(task["operator"])
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010 - a property
    # What has no deterministic implementation is plain PyTorch's.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with using(task["precision"]) as dtype:
            operator, *references = _outputs(task["operator"], _tuples(task["case"]), dtype, device)
            plain, truth = (_to_cpu(outputs()) for outputs in references)
            with use_backend(task["backend"]):
                got = _to_cpu(operator())
        share, row["where"] = worst_error(got, truth, errors(plain, truth))
        row["error_over_allowed"] = share
        if not share <= 1:
            row |= {"status": FAILED, "reason": f"{share:.3g} times what is allowed"}
    except Exception as error:
        if workers.is_lost(device):
            raise
        row |= {"status": FAILED, "reason": workers.first_line(error)}
    finally:
        torch.use_deterministic_algorithms(False)
    return row


def run(job: Job) -> Result:
    """All cases, as far as the time goes; every broken rule is a failure."""
    rows: list[Result] = []
    everything = list(tasks(job.precisions))
    result: Result = {"cases": len(everything), "rows": rows, "failures": []}

    def handle(task: workers.Task, answer: workers.Answer) -> None:
        row = answer.result or task | {**EMPTY, "status": FAILED, "reason": answer.error}
        row["case"] = describe(row["case"])
        rows.append(row)
        if row["status"] != OK:
            result["failures"].append(
                "{operator} {backend} {precision} {case}: {reason}".format(**row)
            )
        result["worst"] = worst(rows)
        job.save(result)

    left = workers.run(
        workers.command("rule", job.device),
        everything,
        handle,
        count=min(WORKERS, max(3 * (os.cpu_count() or 2) // 4, 1)),
        until=job.until,
        task_seconds=TASK_SECONDS,
    )
    return result | {"left_out": len(left)}


def worst(rows: list[Result]) -> list[Result]:
    """The row with the largest share of each operator, backend and precision."""
    found: dict[tuple[str, str, str], Result] = {}
    for row in rows:
        key = (row["operator"], row["backend"], row["precision"])
        if key not in found or _size(row) > _size(found[key]):
            found[key] = row
    return list(found.values())


def _size(row: Result) -> float:
    share = row.get("error_over_allowed")
    return float("inf") if share is None else share


def describe(case: dict[str, Any]) -> str:
    """A case in a word per number."""
    return " ".join(
        f"{name}={'x'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in case.items()
    )


def _to_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _tuples(case: dict[str, Any]) -> dict[str, Any]:
    """As before JSON made lists of them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in case.items()}


def _outputs(
    operator: str, case: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Tensors], Callable[[], Tensors], Callable[[], Tensors]]:
    """What gives the outputs of the operator, of plain PyTorch, and the truth."""
    from tests.cases import (  # not for who plans only
        AddLayerNormCase,
        AttentionCase,
        LayerNormCase,
        MLPCase,
    )

    if operator == "tmsa":
        return _tmsa(dtype, device, **case)
    if operator == "window_attention":
        attention = AttentionCase(**case, dtype=dtype, device=device.type)
        plain, truth = (partial(f, device.type) for f in (attention.plain, attention.truth))
        return attention.operator, plain, truth
    kinds = {"mlp": MLPCase, "add_layer_norm": AddLayerNormCase, "layer_norm": LayerNormCase}
    kind = kinds[operator]
    made, move = kind(**case, dtype=dtype), partial(torch.Tensor.to, device=device)
    return partial(made.operator, None, move), partial(made.plain, move), partial(made.truth, move)


def _tmsa(
    dtype: torch.dtype, device: torch.device, window: tuple[int, int], head_dim: int
) -> tuple[Callable[[], Tensors], Callable[[], Tensors], Callable[[], Tensors]]:
    """Two heads, four samples of two by two windows, a time token of 20 numbers."""
    from tests.cases import gradients
    from tests.published import published_tmsa

    dim, (wh, ww) = 2 * head_dim, window
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, columns: int = 1) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (numbers * columns**-0.5).to(device, dtype)

    inputs = {
        "x": normal(4, 4 * wh * ww, dim),
        "temb": normal(4, 20),
        "qkv_weight": normal(3 * dim, dim, columns=dim),
        "qkv_bias": normal(3 * dim),
        "temb_weight": normal(3 * dim, 20, columns=20),
        "temb_bias": normal(3 * dim),
        "rel_pos_table": normal((2 * wh - 1) * (2 * ww - 1), 2).float(),
        "proj_weight": normal(dim, dim, columns=dim),
        "proj_bias": normal(dim),
    }
    grad = normal(4, 4 * wh * ww, dim)

    def outputs(function: Callable[..., Tensor], exact: bool) -> Tensors:
        leaves = {
            name: (x.double() if exact else x).detach().requires_grad_()
            for name, x in inputs.items()
        }
        y = function(**leaves, num_heads=2, window_size=window, grid_size=(2 * wh, 2 * ww))
        return {"y": y.detach()} | gradients(y, leaves, grad.to(y.dtype))

    return (
        partial(outputs, tmsa, False),
        partial(outputs, published_tmsa, False),
        partial(outputs, published_tmsa, True),
    )
