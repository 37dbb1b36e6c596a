"""Keys and values at logical positions, which `paged_decode` reads, and its results."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Entries:
    """One segment of a cache.

    keys_BKSC [B, K, S, C] and values_BKSV [B, K, S, V]. positions_BKS (int64): logical positions, below 0 where a slot
    holds nothing; its K axis is 1 when all kv heads hold the same entries; None: every query sees every slot.
    channels_BKC (int64, distinct): which of the H channels of a key the C stored ones are; None: all, in order.
    value_channels_BKV: the same of values. log_counts_BKS (accumulation dtype): added to the logits, the logarithm of
    how many tokens an entry stands for; -inf: for none.
    """

    keys_BKSC: Tensor
    values_BKSV: Tensor
    positions_BKS: Tensor | None
    channels_BKC: Tensor | None = None
    value_channels_BKV: Tensor | None = None
    log_counts_BKS: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.keys_BKSC.shape[2]

    def placed(self) -> "Entries":
        """The entries with positions; where there were none, all are 0, which every query sees."""
        if self.positions_BKS is not None:
            return self
        keys = self.keys_BKSC
        nowhere = torch.zeros(1, 1, 1, dtype=torch.int64, device=keys.device)
        return replace(self, positions_BKS=nowhere.expand(keys.shape[0], 1, keys.shape[2]))


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """out_BNTH. accumulated_BKS (accumulation dtype, S over prefix then tail): weights summed over the T queries and
    over the query heads of a kv head. dots_BKP (accumulation dtype): probe . stored key, unscaled, for every slot of
    the prefix.
    """

    out_BNTH: Tensor
    accumulated_BKS: Tensor | None = None
    dots_BKP: Tensor | None = None
