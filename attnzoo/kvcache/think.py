"""ThinK: keys without the channels that matter least to the products with queries.

Source: Xu et al. 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning" (arXiv 2407.21018), section 3. Of every kv
head the channels of the highest score stay (see `channels`); queries of the last `window` tokens are observed, whose
keys and those of all generated tokens stay whole.

Differs from the paper: scores of a group are exact for grouped kv heads, and keys are stored once a kv head;
score="greedy" takes the whole quadratic form; retail=n prunes the tail again when it has n tokens more than the
window, by the first mask; values lose channels by sum_s v_sd^2 alone (value_channel_ratio, off by default). In
relative attention the terms of position keep all channels of the query.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, Layer, Reader
from attnzoo.kvcache.channels import (
    best_channels,
    channel_scores,
    greedy_scores,
    kept_channels,
    squares,
    take_channels,
)
from attnzoo.kvcache.compressed import CompressedState, Prefix
from attnzoo.kvcache.options import ChannelOptions, Prefill, check_least
from attnzoo.kvcache.tailed import TailedCache, cut_tail
from attnzoo.types import dtype_bytes


@dataclass(frozen=True, kw_only=True)
class ThinKConfig(ChannelOptions):
    """score: of a key channel, "think" or "greedy". retail: tokens beyond the window at which the tail is pruned, None:
    never. prefill: "stream" prunes after every chunk of the prompt, by the first chunk's mask."""

    score: Literal["think", "greedy"] = "think"
    retail: int | None = None
    prefill: Prefill = "oneshot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retail is not None:
            check_least("retail", self.retail, 1)


@CACHES.register("think")
class ThinKCache(TailedCache):
    """All tokens stay, their keys get thinner."""

    source = "Xu et al. 2024, arXiv 2407.21018, section 3"
    Config: ClassVar[type] = ThinKConfig
    observes = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.one_by_one = config.retail is not None

    @property
    def lossless(self) -> bool:
        return bool(self.config.channel_ratio == 1.0 and self.config.value_channel_ratio == 1.0)

    def scores(self, queries_BNWH: Tensor | None, keys_BKSH: Tensor, held_BKS: Tensor) -> Tensor:
        """score_BKH of the key channels."""
        assert queries_BNWH is not None
        score = greedy_scores if self.config.score == "greedy" else channel_scores
        return score(queries_BNWH, keys_BKSH, held_BKS)

    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> CompressedState:
        state = super().init(batch, num_kv_heads, head_dim, capacity, device=device, dtype=dtype)
        index = state.starts_B.new_zeros(batch, num_kv_heads, 0)
        prefix = replace(state.prefix, channels_BKC=index, value_channels_BKV=index.clone())
        return state if self.lossless else replace(state, prefix=prefix)

    def before_append(self, state: CompressedState, reader: Reader, positions_BT: Tensor) -> CompressedState:
        retail, lengths_B = self.config.retail, positions_BT[:, 0]
        if retail is None or self.lossless or cc.reading(state):
            return state
        long_B = lengths_B - state.starts_B >= self.config.window + retail
        if not bool(long_B.any()):
            return state
        # Only the long ones: what happens to a sequence does not depend on its neighbours.
        ends_B = torch.where(long_B, lengths_B - self.config.window, state.starts_B)
        return self._pruned(state, lengths_B, ends_B)

    def shrink(self, layer: Layer) -> CompressedState:
        ends_B = torch.maximum(layer.lengths_B - self.config.window, layer.state.starts_B)
        return self._pruned(layer.state, layer.lengths_B, ends_B)

    def _pruned(self, state: CompressedState, lengths_B: Tensor, ends_B: Tensor) -> CompressedState:
        """What the tail holds before position ends_B, pruned and in the prefix. The first call chooses the channels,
        even where nothing is to be pruned yet."""
        old = state.prefix
        used = int((lengths_B - state.starts_B).max())
        keys, values = state.tail.keys_BKSH[:, :, :used], state.tail.values_BKSH[:, :, :used]
        channels, value_channels = old.channels_BKC, old.value_channels_BKV
        if _unchosen(channels) and _unchosen(value_channels):
            held = (torch.arange(used, device=lengths_B.device) < lengths_B[:, None])[:, None]
            channels, value_channels = self.masks(state.queries_BNWH, keys, values, held)
        prefix = Prefix(
            keys_BKPC=_joined(old.keys_BKPC, thin(keys, channels), state.starts_B, ends_B),
            values_BKPV=_joined(old.values_BKPV, thin(values, value_channels), state.starts_B, ends_B),
            channels_BKC=channels,
            value_channels_BKV=value_channels,
        )
        return replace(state, prefix=prefix, tail=cut_tail(state, ends_B, lengths_B), starts_B=ends_B)

    def masks(
        self, queries_BNWH: Tensor | None, keys_BKSH: Tensor, values_BKSH: Tensor, held_BKS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(channels_BKC, value_channels_BKV); none in them where all stay."""
        head_dim = keys_BKSH.shape[3]
        none = torch.zeros(*keys_BKSH.shape[:2], 0, dtype=torch.int64, device=keys_BKSH.device)
        kept, kept_values = (
            kept_channels(head_dim, ratio) for ratio in (self.config.channel_ratio, self.config.value_channel_ratio)
        )
        channels = values = none
        if kept < head_dim:
            channels = best_channels(self.scores(queries_BNWH, keys_BKSH, held_BKS), kept)
        if kept_values < head_dim:
            values = best_channels(squares(values_BKSH, held_BKS), kept_values)
        return channels, values

    def compressed_nbytes(
        self, batch: int, num_kv_heads: int, head_dim: int, prompt: int, dtype: torch.dtype, *, tokens: int = 0
    ) -> int:
        if self.lossless or prompt <= self.config.window:
            return self.nbytes(batch, num_kv_heads, head_dim, prompt + tokens, dtype)
        tail = self.config.window + tokens
        if self.config.retail is not None:
            # The tail shrinks to the window before the token after the one that filled it.
            tail = self.config.window + tokens - max(0, tokens - 1) // self.config.retail * self.config.retail
        pruned = prompt + tokens - tail
        kept, kept_values = (
            kept_channels(head_dim, ratio) for ratio in (self.config.channel_ratio, self.config.value_channel_ratio)
        )
        index = 8 * sum(count for count in (kept, kept_values) if count < head_dim)
        entries = pruned * (kept + kept_values) + 2 * head_dim * cc.pages(tail)
        return batch * (num_kv_heads * (entries * dtype_bytes(dtype) + index) + 16)


def thin(x_BKSH: Tensor, channels_BKC: Tensor | None) -> Tensor:
    """x_BKSC, or all of x where no channels are named."""
    if channels_BKC is None or _unchosen(channels_BKC):
        return x_BKSH
    return take_channels(x_BKSH, channels_BKC)


def _unchosen(channels_BKC: Tensor | None) -> bool:
    return channels_BKC is None or channels_BKC.shape[2] == 0


def _joined(prefix_BKPC: Tensor, tail_BKSC: Tensor, starts_B: Tensor, ends_B: Tensor) -> Tensor:
    """Entries at positions 0..ends_B-1 in their slots: the prefix's up to starts_B, then the tail's."""
    slots_P = torch.arange(int(ends_B.max()), device=starts_B.device)
    gone_BP = slots_P >= ends_B[:, None]
    if prefix_BKPC.shape[2] == 0:
        return tail_BKSC[:, :, : len(slots_P)].masked_fill(gone_BP[:, None, :, None], 0.0)
    both = torch.cat([prefix_BKPC, tail_BKSC], dim=2)
    index_BP = torch.where(slots_P < starts_B[:, None], slots_P, prefix_BKPC.shape[2] + slots_P - starts_B[:, None])
    index_BP = index_BP.clamp(max=both.shape[2] - 1)
    rows = both.gather(2, index_BP[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))
    return rows.masked_fill_(gone_BP[:, None, :, None], 0.0)
