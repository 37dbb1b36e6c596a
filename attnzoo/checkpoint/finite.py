"""Checks for NaN and infinity in weights: a model with one of them repeats a single token or answers nothing."""

from pathlib import Path

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether all elements are finite, in one pass and without a copy."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)  # NaN is both
    return bool((low.isfinite() & high.isfinite()).item())


def check_finite(path: Path, name: str, first: int, rows: Tensor, loaded: Tensor) -> None:
    """Raises ValueError that names the tensor where `loaded` holds NaN or infinity: `rows` of the file, from row
    `first` on, in the dtype that was asked for."""
    if is_finite(loaded):
        return
    if is_finite(rows):
        raise ValueError(
            f"{path}: tensor {name} has numbers that {loaded.dtype} cannot hold; load it as bfloat16 or float32"
        )
    bad = (~rows.isfinite()).nonzero()[0].tolist()
    if bad:
        bad[0] += first
    raise ValueError(
        f"{path}: tensor {name} is not finite (NaN or infinity, first at {bad}); the file is damaged or training "
        "diverged: take an earlier one, or skip this check with check_finite=False (check_weights=false in a server)"
    )
