"""Sines and cosines of positions: r_n = [sin(n w) ; cos(n w)], w_t = 10000^(-2t/D) (arXiv 1901.02860, section 3.3).

Angles are taken in float64: half precision cannot represent the phase of a position of a few thousand. Tables are
constants that all layers and steps share, kept in the largest size requested so far: do not write into them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.derived_memory import shared, without_values

STRIDE = 64
"""Distance in positions between two rows of `turns`."""

_TABLES: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}


def angles(positions: Tensor, width: int) -> Tensor:
    """position * w_t in float64: [..., D / 2]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.to(torch.float64)[..., None] * 10000.0**-exponents


def waves(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """r_PD for positions 0..rows-1."""

    def make(count: int) -> Tensor:
        angle = angles(torch.arange(count, device=device), width)
        return torch.cat([angle.sin().to(dtype), angle.cos().to(dtype)], dim=-1)

    return _kept(("waves", width, device, dtype), rows, make)


def turns(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """exp(1j w_t STRIDE m) for m = 0..rows-1, complex: [M, D / 2]."""

    def make(count: int) -> Tensor:
        angle = angles(STRIDE * torch.arange(count, device=device), width)
        return torch.complex(angle.cos().to(dtype), angle.sin().to(dtype))

    return _kept(("turns", width, device, dtype), rows, make)


def _kept(key: tuple[str, int, torch.device, torch.dtype], rows: int, make: Callable[[int], Tensor]) -> Tensor:
    if without_values():
        return shared(lambda: make(rows))
    table = _TABLES.get(key)
    if table is None or len(table) < rows:
        # Doubling keeps the cost of a context that grows token by token linear in its final length. A table made in
        # inference mode could not be used in training.
        with torch.inference_mode(False):
            table = _TABLES[key] = make(max(rows, 0 if table is None else 2 * len(table)))
    return table[:rows]
