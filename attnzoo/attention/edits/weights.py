"""Sums of weights that edits divide by: what is so little that it is none, and rows that keep their sums."""

import torch
from torch import Tensor

_LEAST = {torch.float32: 1e-34, torch.float64: 1e-304}


def least_weight(dtype: torch.dtype) -> float:
    """The least weight that an edit divides by: 1e-34 in float32, 1e-304 in float64. Less is none. It is ten thousand
    times the smallest normal number, below which weights of keys are dropped: sums over keys and over classes agree."""
    return _LEAST[dtype]


def is_some(x: Tensor, row: Tensor) -> Tensor:
    """Where x is any weight, for itself and as a part of a row of this weight: where a division by it is finite."""
    return x.abs() >= row.abs().clamp(min=1.0) * least_weight(x.dtype)


def with_sums_of(before_NRS: Tensor, after_NRS: Tensor, rows_NR1: Tensor) -> Tensor:
    """`after`, whose named rows are scaled to the sums that they had before, but for rows without any weight left."""
    had, has = before_NRS.sum(-1, keepdim=True), after_NRS.sum(-1, keepdim=True)
    scaled_NR1 = rows_NR1 & is_some(has, had)
    return torch.where(scaled_NR1, after_NRS * (had / torch.where(scaled_NR1, has, 1.0)), after_NRS)
