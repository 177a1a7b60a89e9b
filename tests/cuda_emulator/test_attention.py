"""The kernels in memory without a byte to spare, and with mistakes planted in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator import build

if build.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

# One head width is enough: what is padded, and what is not. Warpgroups have another: it takes the
# places of all that come before it.
WIDTH, WARPGROUP_WIDTH = 16, 80
FLAGS = (*build.SANITIZED, f"-DDIFFIT_FOR_EACH_WIDTH(X)=X({WIDTH})")
WARPGROUP_FLAGS = (
    *build.SANITIZED,
    f"-DDIFFIT_FOR_EACH_WIDTH(X)={f'X({WARPGROUP_WIDTH})' * 5}",
    build.WARPGROUPS,
)
# Window, grid, batch, heads, head width.
SHAPES = [
    (1, 1, 3, 2, 2, 3, 8),
    (3, 5, 9, 10, 2, 2, 16),
    (4, 4, 8, 12, 1, 2, 8),
    (7, 7, 7, 14, 1, 1, 16),
    (8, 8, 8, 16, 2, 1, 8),
    (5, 20, 5, 40, 1, 1, 16),
    (2, 67, 2, 67, 3, 1, 8),
    (12, 14, 12, 14, 1, 2, 8),
    (9, 16, 9, 16, 1, 1, 16),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Objects; that of the kernels in bfloat16 is the first."""
    folder = tmp_path_factory.mktemp("attention")
    return [*build.objects(folder, FLAGS, widths=[WIDTH]), *build.launcher(folder, FLAGS)]


@pytest.fixture(scope="module")
def attention(parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("attention") / "attention"
    return build.link(target, [build.EMULATOR / "attention.cpp", *parts], FLAGS)


@pytest.fixture(scope="module")
def warpgroup_parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Objects; that of the warpgroup kernels in bfloat16 is the first."""
    folder = tmp_path_factory.mktemp("warpgroup")
    return [
        *build.warpgroup(folder, WARPGROUP_FLAGS),
        *build.objects(folder, WARPGROUP_FLAGS, widths=[WARPGROUP_WIDTH]),
        *build.launcher(folder, WARPGROUP_FLAGS),
    ]


@pytest.fixture(scope="module")
def warpgroup_attention(
    warpgroup_parts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target = tmp_path_factory.mktemp("warpgroup") / "attention"
    return build.link(target, [build.EMULATOR / "attention.cpp", *warpgroup_parts], WARPGROUP_FLAGS)


def run(program: Path, shape: tuple[int, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, shape)], capture_output=True, text=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_touched_that_is_not_there(attention: Path, shape: tuple[int, ...]) -> None:
    done = run(attention, shape)
    assert done.returncode == 0, done.stderr
    counts = [line.split() for line in done.stdout.splitlines()]
    assert len(counts) == 8
    for _, access, needed, made in counts:
        if access == "ldmatrix":
            assert 0 < int(needed) == int(made), "the rows of a tile are in different banks"


# Products are slow here: one block of several windows, and two blocks of one.
@pytest.mark.parametrize("shape", [(4, 32, 8, 32, 3, 1, 64), (16, 16, 16, 16, 1, 1, 72)], ids=str)
def test_warpgroups_touch_nothing_that_is_not_there(
    warpgroup_attention: Path, shape: tuple[int, ...]
) -> None:
    done = run(warpgroup_attention, shape)
    assert done.returncode == 0, done.stderr


# A file, what is replaced in it, by what, and what is then found.
PLANTED = {
    "no barrier after the copies": (
        "attention_small.h",
        r"(add_row<T, D>.*?)block_barrier\(\);",
        r"\1",
        "nobody wrote|race|waited",
    ),
    "no wait for the values": (
        "attention_small.h",
        r"wait_for_copies<0>\(\);",
        "",
        "not waited for|under way",
    ),
    "no barrier before P takes the place of the sums": (
        "attention_small.h",
        r"(before = load\(kept.*?)warp_barrier\(\);",
        r"\1",
        "race",
    ),
    "no barrier before the next window": (
        "attention_small.h",
        r"(store_lse\(.*?)block_barrier\(\);",
        r"\1",
        "race",
    ),
    "no barrier before a tile is replaced": (
        "attention_large.h",
        r"(if \(tile\) {\s+wait_for_copies<0>\(\);\s+)block_barrier\(\);",
        r"\1",
        "race",
    ),
    "no barrier before the next window of a head": (
        "attention_large_backward.h",
        r"block_barrier\(\);  // the window before is done with its tiles",
        "",
        "race|nobody wrote",
    ),
    "no barrier between the pairs and their sums": (
        "diagonals.h",
        r"(for \(int r = 0.*?)warp_barrier\(\);",
        r"\1",
        "race",
    ),
    "no barrier between the lanes of a warp": (
        "tiles.h",
        r"warp_barrier\(\);",
        "",
        "race",
    ),
    "no wait for the copies": (
        "attention_large.h",
        r"(if \(tile\) {\s+)wait_for_copies<0>\(\);",
        r"\1",
        "not waited for|under way",
    ),
    "one copy under way too many": (
        "attention_large.h",
        r"(if \(tile\) {\s+)wait_for_copies<0>\(\);",
        r"\1wait_for_copies<1>();",
        "not waited for|under way",
    ),
    "a slot too many is looked up": (
        "attention_large.h",
        r"slots.offsets \+ \(first \+ row\)",
        "slots.offsets + (first + row + 1)",
        "nobody wrote|race|out of bounds",
    ),
    "a wrong row of the table": (
        "logits.h",
        r"\(window.center\(\) \+ \(RowsAreKeys",
        "(1 + window.center() + (RowsAreKeys",
        "out of bounds|nobody wrote",
    ),
}


# The same for warpgroups.
PLANTED_FOR_WARPGROUPS = {
    "no barrier before a tile is replaced": (
        r"(const auto await_values.*?)block_barrier\(\);",
        r"\1",
        "race|under way|not waited for",
    ),
    "no wait for the values": (
        r"(const auto await_values.*?)wait_for_phase\(.*?\);",
        r"\1(void)of;",
        "not waited for",
    ),
    "more is copied than a barrier expects": (
        r"\(next_tile \? 1 : 1 \+ warpgroup_groups\)",
        "1",
        "more bytes",
    ),
    "products are not waited for before their tile is replaced": (
        r"(multiply_keys\(1, step \+ 1\);.*?)wait_for_products\(\);",
        r"\1",
        "race|under way|not waited for",
    ),
    "no zeros beside the last unit": (
        r"store\(\(zeros.*?;",
        ";",
        "nobody wrote",
    ),
}


@pytest.mark.parametrize("name", PLANTED_FOR_WARPGROUPS)
def test_a_mistake_planted_for_warpgroups_is_found(
    name: str, warpgroup_parts: list[Path], tmp_path: Path
) -> None:
    pattern, replacement, found = PLANTED_FOR_WARPGROUPS[name]
    kernels = tmp_path / "kernels"
    shutil.copytree(build.KERNELS, kernels)
    file = kernels / "attention_large_warpgroup.h"
    changed = re.sub(pattern, replacement, file.read_text(), count=1, flags=re.DOTALL)
    assert changed != file.read_text()
    file.write_text(changed)
    wrong = build.warpgroup(tmp_path, WARPGROUP_FLAGS, kernels=kernels, types=["BFloat16"])
    program = build.link(
        tmp_path / "attention",
        [build.EMULATOR / "attention.cpp", *wrong, *warpgroup_parts[1:]],
        WARPGROUP_FLAGS,
    )
    done = run(program, (16, 16, 16, 16, 1, 1, 72))
    assert done.returncode != 0
    assert re.search(found, done.stderr), done.stderr


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name: str, parts: list[Path], tmp_path: Path) -> None:
    file, pattern, replacement, found = PLANTED[name]
    kernels = tmp_path / "kernels"
    shutil.copytree(build.KERNELS, kernels)
    text = (kernels / file).read_text()
    changed = re.sub(pattern, replacement, text, count=1, flags=re.DOTALL)
    assert changed != text
    (kernels / file).write_text(changed)
    wrong = build.objects(tmp_path, FLAGS, kernels=kernels, widths=[WIDTH], types=["BFloat16"])
    program = build.link(
        tmp_path / "attention", [build.EMULATOR / "attention.cpp", *wrong, *parts[1:]], FLAGS
    )
    shape = (3, 5, 9, 10, 2, 2, 16) if "small" in file else (12, 14, 12, 14, 1, 1, 16)
    done = run(program, shape)
    assert done.returncode != 0
    assert re.search(found, done.stderr), done.stderr
    if "Sanitizer" not in found:
        assert re.search(r"with \d+ blocks of 128 threads and \d+ bytes of shared", done.stderr)
