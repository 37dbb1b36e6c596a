"""Sizes of tiles for each kernel and kind of GPU, found by compiling ahead of time: the largest that do not spill.

tests/unit/test_triton_aot.py compiles these sizes. No speed was measured, for want of a GPU: where several sizes fit,
the one with fewer registers was taken. On NVIDIA float32 heads wider than 128 spill with a table at any size; on sm_90
those of 65 to 128 channels do by up to 16 bytes a thread where keys after the query may be seen.
"""

from dataclasses import dataclass
from functools import cache

import torch

KERNELS = ("forward", "query", "key", "table")
ARCHITECTURES = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """block x block tiles, and how a program is spread over warps and pipelined."""

    block: int
    num_warps: int
    num_stages: int


# (bytes of a number, padded head dim, whether there is a table, architecture): block, warps, stages of each of KERNELS
_TILINGS: dict[tuple[int, int, bool, str], tuple[tuple[int, int, int], ...]] = {
    (2, 64, True, "sm_80"): ((32, 4, 2), (32, 4, 2), (32, 4, 2), (32, 4, 2)),
    (2, 64, True, "sm_90"): ((64, 4, 2), (32, 4, 2), (32, 4, 2), (32, 4, 2)),
    (2, 64, True, "gfx942"): ((64, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
    (2, 64, False, "sm_80"): ((64, 4, 2), (64, 4, 2), (32, 4, 2)),
    (2, 64, False, "sm_90"): ((64, 4, 2), (64, 4, 2), (64, 8, 2)),
    (2, 64, False, "gfx942"): ((64, 4, 2), (64, 4, 2), (32, 4, 2)),
    (2, 128, True, "sm_80"): ((32, 4, 2), (32, 8, 2), (32, 8, 2), (32, 8, 2)),
    (2, 128, True, "sm_90"): ((64, 8, 2), (32, 8, 2), (32, 8, 2), (32, 8, 2)),
    (2, 128, True, "gfx942"): ((32, 4, 1), (32, 4, 1), (32, 4, 1), (32, 4, 1)),
    (2, 128, False, "sm_80"): ((32, 4, 2), (64, 8, 2), (64, 8, 2)),
    (2, 128, False, "sm_90"): ((64, 8, 2), (64, 8, 2), (32, 4, 2)),
    (2, 128, False, "gfx942"): ((64, 4, 2), (32, 4, 2), (32, 4, 2)),
    (2, 256, True, "sm_80"): ((16, 4, 2), (16, 8, 2), (16, 4, 2), (16, 4, 2)),
    (2, 256, True, "sm_90"): ((16, 4, 2), (16, 8, 2), (16, 4, 2), (16, 4, 2)),
    (2, 256, True, "gfx942"): ((16, 4, 1), (16, 4, 1), (16, 4, 1), (16, 4, 1)),
    (4, 64, True, "sm_80"): ((16, 4, 2), (16, 4, 2), (16, 8, 2), (16, 4, 2)),
    (4, 64, True, "sm_90"): ((16, 4, 2), (16, 4, 2), (16, 8, 2), (16, 4, 2)),
    (4, 64, True, "gfx942"): ((32, 4, 1), (32, 4, 1), (16, 4, 1), (32, 4, 1)),
    (4, 64, False, "sm_80"): ((32, 8, 1), (32, 8, 1), (32, 8, 1)),
    (4, 64, False, "sm_90"): ((32, 8, 1), (32, 8, 1), (32, 8, 1)),
    (4, 64, False, "gfx942"): ((32, 8, 1), (32, 8, 1), (16, 4, 1)),
    (4, 128, True, "sm_80"): ((16, 8, 2), (16, 4, 2), (16, 8, 2), (16, 8, 2)),
    (4, 128, True, "sm_90"): ((16, 8, 2), (16, 4, 2), (16, 8, 2), (16, 8, 2)),
    (4, 128, True, "gfx942"): ((16, 4, 1), (16, 4, 1), (16, 4, 1), (16, 4, 1)),
    (4, 256, True, "sm_80"): ((16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1)),
    (4, 256, True, "sm_90"): ((16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1)),
    (4, 256, True, "gfx942"): ((16, 4, 1), (16, 4, 1), (16, 4, 1), (16, 4, 1)),
}


# The same where keys after the query may be seen: what spills with the tiles above.
_AHEAD: dict[tuple[str, int, int, bool, str], tuple[int, int, int]] = {
    ("query", 2, 128, False, "sm_80"): (32, 4, 2),
    ("query", 2, 128, True, "sm_80"): (16, 4, 2),
    ("query", 2, 128, True, "sm_90"): (16, 4, 2),
    ("key", 2, 256, False, "sm_90"): (16, 8, 1),
    ("table", 4, 64, True, "sm_80"): (16, 8, 1),
    ("table", 4, 64, True, "sm_90"): (16, 8, 1),
    ("forward", 4, 128, True, "sm_80"): (16, 8, 1),
    ("forward", 4, 128, True, "sm_90"): (16, 8, 1),
    ("query", 4, 128, True, "sm_80"): (16, 8, 1),
    ("query", 4, 128, True, "sm_90"): (16, 8, 1),
    ("key", 4, 128, True, "sm_90"): (16, 8, 1),
    ("query", 4, 256, False, "sm_80"): (16, 16, 2),
    ("query", 4, 256, False, "sm_90"): (16, 8, 2),
    ("key", 4, 256, False, "sm_80"): (16, 4, 1),
}


def tiling(
    kernel: str, dtype: torch.dtype, head_dim: int, with_table: bool, architecture: str, ahead: bool = False
) -> Tiling:
    """The tiles of one kernel; head_dim up to 256. Without a table, sizes with one are used where none are listed.

    `ahead`: for masks that show keys after the query.
    """
    width = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    if kernel not in KERNELS:
        block, num_warps, num_stages = (32, 4, 1) if width == 256 else (64, 4, 2)
    else:
        found = _TILINGS.get((dtype.itemsize, width, with_table, architecture))
        chosen = found or _TILINGS[dtype.itemsize, width, True, architecture]
        sizes = chosen[KERNELS.index(kernel)]
        if ahead:
            sizes = _AHEAD.get((kernel, dtype.itemsize, width, with_table, architecture), sizes)
        block, num_warps, num_stages = sizes
    return Tiling(block=block, num_warps=num_warps, num_stages=num_stages)


@cache
def architecture() -> str:
    """The nearest of ARCHITECTURES. Consumer GPUs count as sm_80, whose tiles fit their 99 KiB of shared memory."""
    if torch.version.hip is not None:
        return "gfx942"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10):
        return "sm_90"
    return "sm_80"
