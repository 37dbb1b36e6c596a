"""D2O, then ThinK: tokens are evicted and merged on whole keys, then the survivors' keys lose channels.

Source: Wan et al. 2024 (arXiv 2406.13035) and Xu et al. 2024 (arXiv 2407.21018); the order of the two is ThinK's
section on token eviction (KV cache pruned by tokens first). While decoding, an evicted token is merged into a pruned
key on the kept channels. The newest `window` tokens keep all channels; the oldest is pruned and takes the free slot.

Differs from both papers: nothing is merged into the window; generated keys keep all channels only within the window (in
ThinK always), so that memory stays constant.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, CacheSize, NewTokens, ScoreFunction
from attnzoo.kvcache.channels import best_channels, channel_scores, greedy_scores, kept_channels, squares
from attnzoo.kvcache.d2o import D2OCache, D2OConfig
from attnzoo.kvcache.entries import kept_columns, stored_norms
from attnzoo.kvcache.merging import D2OState
from attnzoo.kvcache.options import check_least, check_ratio
from attnzoo.kvcache.think import thin
from attnzoo.ops.paged_decode import Entries


@dataclass(frozen=True, kw_only=True)
class D2OThinKConfig(D2OConfig):
    """D2O's options and ThinK's."""

    channel_ratio: float = 0.5
    value_channel_ratio: float = 1.0
    window: int = 32
    score: Literal["think", "greedy"] = "think"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("channel_ratio", self.channel_ratio)
        check_ratio("value_channel_ratio", self.value_channel_ratio)
        check_least("window", self.window, 1)
        whole = self.channel_ratio == 1.0 and self.value_channel_ratio == 1.0
        if self.ratio == 1.0 and not whole:
            raise ValueError(
                f"keep_ratio=1.0 evicts nothing, and channel_ratio={self.channel_ratio} prunes: use the policy 'think'"
            )


@dataclass
class D2OThinKState(D2OState):
    """channels_BKC, value_channels_BKV (int64): the channels stored of kept keys and values; [B, K, 0] means all.
    queries_BNWH: the last W queries of the prompt, the newest last; none once it has ended."""

    channels_BKC: Tensor
    value_channels_BKV: Tensor
    queries_BNWH: Tensor

    def compressed(self) -> Entries:
        channels, values = cc.stored(self.channels_BKC), cc.stored(self.value_channels_BKV)
        return replace(super().compressed(), channels_BKC=channels, value_channels_BKV=values)


@CACHES.register("d2o+think")
class D2OThinKCache(D2OCache):
    """D2O's eviction and merging, then ThinK's channel pruning."""

    source = "Wan et al. 2024, arXiv 2406.13035; Xu et al. 2024, arXiv 2407.21018"
    Config = D2OThinKConfig

    def __init__(self, config: D2OThinKConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.thins = min(config.channel_ratio, config.value_channel_ratio) < 1.0

    def _widths(self, head_dim: int) -> tuple[int, int]:
        """Channels of a kept key and value."""
        ratios = self.config.channel_ratio, self.config.value_channel_ratio
        return kept_channels(head_dim, ratios[0]), kept_channels(head_dim, ratios[1])

    def kept_columns(self, size: CacheSize, slots: int) -> dict[str, Tensor]:
        # Before the prompt ends there are no slots, and all channels.
        widths = self._widths(size.head_dim) if slots else (size.head_dim, size.head_dim)
        return kept_columns(size, slots, *widths)

    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> D2OThinKState:
        chosen = [width if ended and width < size.head_dim else 0 for width in self._widths(size.head_dim)]
        return D2OThinKState(
            **self.parts(size, tail, prefix, ended),
            channels_BKC=size.heads(chosen[0], dtype=torch.int64),
            value_channels_BKV=size.heads(chosen[1], dtype=torch.int64),
            queries_BNWH=size.zeros(
                size.num_heads if self.thins and not ended else 0, min(self.window, tail), size.head_dim
            ),
        )

    def read(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, Any]:
        if self.thins and not state.decoding:
            seen = cc.last_queries(state.queries_BNWH, new.q_BNTH, new, self.window)
            state = replace(state, queries_BNWH=seen)
        return super().read(state, score_function, new)

    def thin(self, state: D2OThinKState) -> D2OThinKState:
        """Scores channels on all kept tokens and prunes the tokens that are not in the ring."""
        if not self.thins:
            return state
        kept, ring, queries = state.kept, state.ring, state.queries_BNWH
        # Empty slots are zero and add nothing to a score.
        keys = torch.cat([kept.keys_BKPC, ring.keys_BKRH], dim=2)
        values = torch.cat([kept.values_BKPV, ring.values_BKRH], dim=2)
        held = torch.ones(1, 1, 1, dtype=torch.bool, device=keys.device)
        head_dim, channels, value_channels = keys.shape[3], state.channels_BKC, state.value_channels_BKV
        key_width, value_width = self._widths(head_dim)
        if key_width < head_dim:
            score = greedy_scores if self.config.score == "greedy" else channel_scores
            channels = best_channels(score(queries, keys, held), key_width)
        if value_width < head_dim:
            value_channels = best_channels(squares(values, held), value_width)
        pruned: dict[str, Tensor] = {
            "keys_BKPC": thin(kept.keys_BKPC, channels),
            "values_BKPV": thin(kept.values_BKPV, value_channels),
        }
        if self.config.merge:
            pruned["norms_BKP"] = stored_norms(pruned["keys_BKPC"], state.empty())
        return replace(
            state,
            queries_BNWH=queries[:, :0].clone(),
            kept=replace(kept, **pruned),
            channels_BKC=channels,
            value_channels_BKV=value_channels,
        )
