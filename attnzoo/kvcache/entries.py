"""Entries that were chosen one by one, each with a position of its own, and what is left of them after an eviction."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache.base import CacheSize
from attnzoo.kvcache.compressed import CompressedState, filled_tail
from attnzoo.kvcache.state import State
from attnzoo.ops.evict_merge import Merged
from attnzoo.ops.paged_decode import Entries
from attnzoo.types import accumulation_dtype


@dataclass
class Kept(State):
    """Chosen entries in P slots per kv head, of which the first hold one; positions_BKP (int32)."""

    keys_BKPC: Tensor
    values_BKPV: Tensor
    positions_BKP: Tensor


@dataclass
class KeptState(CompressedState):
    """A state whose compressed entries were chosen one by one. held_B: how many slots of `kept` hold an entry, the
    same in all kv heads."""

    kept: Kept
    held_B: Tensor

    @property
    def slots(self) -> int:
        return self.kept.keys_BKPC.shape[2]

    def held(self) -> Tensor:
        return self.held_B

    def positions(self) -> Tensor:
        return self.kept.positions_BKP.long()

    def compressed(self) -> Entries:
        return Entries(keys_BKSC=self.kept.keys_BKPC, values_BKSV=self.kept.values_BKPV, positions_BKS=None)

    def tail_columns(self, keys_BKSH: Tensor, values_BKSH: Tensor) -> dict[str, Tensor]:
        """What is known of the tail's entries, by the names of the columns of `kept`."""
        return {"keys": keys_BKSH, "values": values_BKSH}

    def entries(self, lengths_B: Tensor) -> dict[str, Tensor]:
        """The columns of all entries, kept ones first; "positions": int64, -1 in empty slots, K axis 1 where all kv
        heads hold the same."""
        view = filled_tail(self, lengths_B)
        columns = {"positions": view.positions_BKS, **self.tail_columns(view.keys_BKSH, view.values_BKSH)}
        if self.slots == 0:
            return columns
        mine = self.kept.columns() | {"positions": torch.where(self.empty(), -1, self.positions())}
        columns["positions"] = columns["positions"].expand(-1, self.kept.keys_BKPC.shape[1], -1)
        return {name: torch.cat([mine[name], x], dim=2) for name, x in columns.items()}


def kept_columns(size: CacheSize, slots: int, key_width: int, value_width: int) -> dict[str, Tensor]:
    """The fields of a `Kept` without an entry."""
    return {
        "keys_BKPC": size.heads(slots, key_width),
        "values_BKPV": size.heads(slots, value_width),
        "positions_BKP": size.heads(slots, dtype=torch.int32),
    }


def packed(kept: Any, merged: Merged, columns: dict[str, Tensor]) -> Any:
    """The entries that stay of `columns`, in place of those of `kept`."""
    index, empty = merged.source_BKM.clamp(min=0), merged.source_BKM < 0

    def column(name: str, before: Tensor) -> Tensor:
        match name.rpartition("_")[0]:
            case "keys":
                return merged.keys_BKMC
            case "values":
                return merged.values_BKMV
            case "norms":
                return stored_norms(merged.keys_BKMC, empty)
            case "merge_counts":
                assert merged.merge_counts_BKM is not None
                return merged.merge_counts_BKM
            case other:
                picked = columns[other].expand(*empty.shape[:2], -1).gather(-1, index)
                return picked.masked_fill(empty, 0).to(before.dtype)

    return kept.map(column)


def stored_norms(keys_BKPC: Tensor, empty_BKP: Tensor) -> Tensor:
    """Norms of keys, 0 for empty slots, in the keys' dtype."""
    exact = keys_BKPC.to(accumulation_dtype(keys_BKPC.dtype))
    return exact.norm(dim=-1).masked_fill(empty_BKP, 0.0).to(keys_BKPC.dtype)
