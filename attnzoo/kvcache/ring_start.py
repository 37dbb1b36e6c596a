"""From prompt to decoding in evicting caches: the newest entries move from the prefix into the ring."""

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.kvcache.compressed import CompressedState, Prefix, Ring


def ringed(state: CompressedState, lengths_B: Tensor, window: int) -> CompressedState:
    """Moves the newest `window` entries of the prefix, whose positions ascend, into the ring."""
    prefix, ring = state.prefix, state.ring
    assert prefix.places_BKP is not None
    assert ring is not None
    held = (prefix.places_BKP > 0).sum(-1)
    newest_BW = lengths_B[:, None] - window + torch.arange(window, device=lengths_B.device)
    slots_BKW = (held[..., None] - window + torch.arange(window, device=held.device)).clamp(min=0)
    turn_BKR = torch.full((*held.shape, window + 1), -1, device=held.device)
    place_BW = torch.where(newest_BW >= 0, newest_BW % (window + 1), window)
    source = torch.where((newest_BW >= 0)[:, None], slots_BKW, -1)
    # Where a sequence is shorter than the window, missing entries write -1 to the slot that the next token takes.
    safe_BW = torch.where(newest_BW >= 0, place_BW, (lengths_B % (window + 1))[:, None])
    turn_BKR.scatter_(-1, safe_BW[:, None].expand(-1, held.shape[1], -1), source)
    index, gone = turn_BKR.clamp(min=0), turn_BKR < 0

    def rows(x_BKPX: Tensor) -> Tensor:
        picked = x_BKPX.gather(2, index[..., None].expand(-1, -1, -1, x_BKPX.shape[3]))
        return picked.masked_fill(gone[..., None], 0.0)

    def numbers(x_BKP: Tensor | None) -> Tensor | None:
        return None if x_BKP is None else x_BKP.gather(-1, index).masked_fill(gone, 0.0)

    new = Ring(
        rows(prefix.keys_BKPC),
        rows(prefix.values_BKPV),
        numbers(prefix.accumulated_BKP),
        numbers(prefix.merge_counts_BKP),
    )
    left = (held - window).clamp(min=0)
    return replace(state, ring=new, prefix=_cut(prefix, left))


def _cut(prefix: Prefix, counts_BK: Tensor) -> Prefix:
    """The first counts_BK entries of each kv head, in as many slots as the longest needs, at least one."""
    slots = max(1, int(counts_BK.max()))
    empty = torch.arange(slots, device=counts_BK.device) >= counts_BK[..., None]

    def cut(x: Tensor) -> Tensor:
        return x[:, :, :slots].masked_fill(empty[..., None] if x.dim() == 4 else empty, 0)

    return prefix.map_entries(cut)
