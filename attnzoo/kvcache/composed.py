"""D2O, then ThinK: tokens are evicted and merged on whole keys, then the survivors' keys lose channels.

Source: Wan et al. 2024 (arXiv 2406.13035) and Xu et al. 2024 (arXiv 2407.21018); the order of the two is ThinK's
section on token eviction (KV cache pruned by tokens first). While decoding, an evicted token is merged into a pruned
key on the kept channels. The newest `window` tokens keep all channels; the oldest is pruned and takes the free slot.

Differs from both papers: nothing is merged into the window; generated keys keep all channels only within the window (in
ThinK always), so that memory stays constant.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, ScoreFunction
from attnzoo.kvcache.channels import best_channels, channel_scores, greedy_scores, kept_channels, squares
from attnzoo.kvcache.compressed import CompressedState
from attnzoo.kvcache.d2o import D2OCache, D2OConfig
from attnzoo.kvcache.entries import stored_norms
from attnzoo.kvcache.eviction import QKV
from attnzoo.kvcache.options import check_least, check_ratio
from attnzoo.kvcache.think import thin


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


@CACHES.register("d2o+think")
class D2OThinKCache(D2OCache):
    """D2O's eviction and merging, then ThinK's channel pruning."""

    source = "Wan et al. 2024, arXiv 2406.13035; Xu et al. 2024, arXiv 2407.21018"
    Config = D2OThinKConfig

    def __init__(self, config: D2OThinKConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.thins = min(config.channel_ratio, config.value_channel_ratio) < 1.0

    def key_width(self, head_dim: int) -> int:
        return kept_channels(head_dim, self.config.channel_ratio)

    def value_width(self, head_dim: int) -> int:
        return kept_channels(head_dim, self.config.value_channel_ratio)

    def index_bytes(self, head_dim: int) -> int:
        return 8 * sum(width for width in (self.key_width(head_dim), self.value_width(head_dim)) if width < head_dim)

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
        if not self.thins:
            return state
        index = state.starts_B.new_zeros(batch, num_kv_heads, 0)
        return replace(
            state,
            prefix=replace(state.prefix, channels_BKC=index, value_channels_BKV=index.clone()),
            queries_BNWH=state.tail.keys_BKSH.new_zeros(batch, 0, self.window, head_dim),
        )

    def observed_nbytes(self, batch: int, num_heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
        if not self.thins:
            return 0
        return cc.observed_bytes(batch, num_heads, head_dim, min(tokens, self.window), dtype)

    def attend(
        self,
        state: CompressedState,
        score_function: ScoreFunction,
        qkv: QKV,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, CompressedState]:
        cc.check_call(*qkv)
        if self.thins and state.ring is not None and state.ring.keys_BKRH.shape[2] == 0:
            seen = cc.last_queries(state.queries_BNWH, qkv[0], counts_B, self.window)
            state = replace(state, queries_BNWH=seen)
        return super().attend(state, score_function, qkv, positions_BT, counts_B)

    def thin(self, state: CompressedState) -> CompressedState:
        """Scores channels on all kept tokens and prunes the tokens that are not in the ring."""
        if not self.thins:
            return state
        prefix, ring, queries = state.prefix, state.ring, state.queries_BNWH
        assert ring is not None
        assert queries is not None
        assert prefix.places_BKP is not None
        # Empty slots are zero and add nothing to a score.
        keys, values = (
            torch.cat(pair, dim=2)
            for pair in ((prefix.keys_BKPC, ring.keys_BKRH), (prefix.values_BKPV, ring.values_BKRH))
        )
        held = torch.ones(1, 1, 1, dtype=torch.bool, device=keys.device)
        head_dim, channels, value_channels = keys.shape[3], prefix.channels_BKC, prefix.value_channels_BKV
        if self.key_width(head_dim) < head_dim:
            score = greedy_scores if self.config.score == "greedy" else channel_scores
            channels = best_channels(score(queries, keys, held), self.key_width(head_dim))
        if self.value_width(head_dim) < head_dim:
            value_channels = best_channels(squares(values, held), self.value_width(head_dim))
        pruned = thin(prefix.keys_BKPC, channels)
        return replace(
            state,
            queries_BNWH=queries[:, :0].clone(),
            prefix=replace(
                prefix,
                keys_BKPC=pruned,
                values_BKPV=thin(prefix.values_BKPV, value_channels),
                channels_BKC=channels,
                value_channels_BKV=value_channels,
                norms_BKP=None if prefix.norms_BKP is None else stored_norms(pruned, prefix.places_BKP == 0),
            ),
        )
