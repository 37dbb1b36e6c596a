"""Tensors as kernels read them: a pointer and strides."""

from typing import Any, NamedTuple

from torch import Tensor


class StridedRows(NamedTuple):
    """A tensor [B, heads, rows, width] with its strides; the last axis is dense. Rows are tokens or slots."""

    x: Any
    batch: Any
    head: Any
    row: Any


def strided_rows(x_BNTH: Tensor) -> StridedRows:
    """The tensor itself where its last axis is dense, else a copy."""
    x = x_BNTH if x_BNTH.stride(-1) == 1 else x_BNTH.contiguous()
    return StridedRows(x, *x.stride()[:3])
