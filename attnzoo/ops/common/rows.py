"""One entry of every kv head, read and written in place."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """place_BK: one slot per kv head; flat_L: its index in a flat [B * K * P]. meant_BK (bool): heads for which `put`
    and `fill` write, None: all."""

    place_BK: Tensor
    flat_L: Tensor
    meant_BK: Tensor | None = None

    def take(self, x_BKPX: Tensor) -> Tensor:
        """x[b, k, place], for x of [B, K, P] or [B, K, P, X]."""
        shape = (*self.place_BK.shape, *x_BKPX.shape[3:])
        if x_BKPX.is_contiguous():
            return x_BKPX.view(-1, *shape[2:]).index_select(0, self.flat_L).view(shape)
        return x_BKPX[self._index()]

    def put(self, x_BKPX: Tensor, new_BKX: Tensor) -> None:
        """x[b, k, place] = new, where meant_BK is True.

        Without `scatter_`, which for rows on a CPU takes as long as a copy of all of x.
        """
        if new_BKX.dtype != x_BKPX.dtype:
            new_BKX = new_BKX.to(x_BKPX.dtype)
        if self.meant_BK is not None:
            meant = self.meant_BK if x_BKPX.dim() == 3 else self.meant_BK[..., None]
            new_BKX = torch.where(meant, new_BKX, self.take(x_BKPX))
        if x_BKPX.is_contiguous() and not torch.compiler.is_compiling():
            rest = x_BKPX.shape[3:]
            x_BKPX.view(-1, *rest).index_copy_(0, self.flat_L, new_BKX.reshape(-1, *rest))
        else:
            x_BKPX[self._index()] = new_BKX

    def fill(self, x_BKP: Tensor, number: float) -> None:
        """`put` of one number."""
        if self.meant_BK is None and x_BKP.is_contiguous() and not torch.compiler.is_compiling():
            x_BKP.view(-1).index_fill_(0, self.flat_L, number)
        else:
            self.put(x_BKP, x_BKP.new_full((), number).expand(self.place_BK.shape))

    def _index(self) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads = self.place_BK.shape
        rows_B1 = torch.arange(batch, device=self.place_BK.device)[:, None]
        return rows_B1, torch.arange(heads, device=self.place_BK.device), self.place_BK


def places(place_BK: Tensor, slots: int, meant_BK: Tensor | None = None) -> Places:
    """`Places` of the slots place_BK in tensors with `slots` slots (P)."""
    batch, heads = place_BK.shape
    heads_L = torch.arange(batch * heads, device=place_BK.device)
    return Places(place_BK, torch.add(place_BK.flatten(), heads_L, alpha=slots), meant_BK)


def places_or_none(place_BK: Tensor, slots: int) -> Places:
    """`places`, where a slot below 0 means: write nothing (and read slot 0)."""
    meant_BK = place_BK >= 0
    if known(meant_BK):
        return places(place_BK, slots)
    return places(place_BK.clamp(min=0), slots, meant_BK)


def known(true: Tensor) -> bool:
    """Whether all values are known to be True. False on a GPU, which would have to be waited for, and in compiled code,
    which cannot read values."""
    return not torch.compiler.is_compiling() and true.device.type == "cpu" and bool(true.all())
