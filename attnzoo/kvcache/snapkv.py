"""SnapKV: keeps the tokens of the prompt that its last queries attend to most.

Source: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469), section 4.
The attention of the last `window` queries is summed over them and over the query heads of a kv head, then smoothed over
neighbouring tokens. The tokens with the highest sums stay, beside the window and all generated tokens.

Differs from the paper: with grouped kv heads, every kv head keeps its own tokens; with prefill="stream", every chunk is
followed by a new choice among the tokens that are left.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, CachedLayer, CacheSize, Need
from attnzoo.kvcache.budgets import asked_tokens
from attnzoo.kvcache.entries import Kept, KeptState, kept_columns, packed
from attnzoo.kvcache.options import TokenOptions, check_least
from attnzoo.kvcache.tailed import TailedCache, cut_tail
from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import MergeRule, evict_merge
from attnzoo.types import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class SnapKVConfig(TokenOptions):
    """window: number of last queries that are observed; their tokens stay. pool: number of tokens smoothed over, odd.
    kind: smoothing by the "mean" or the "max". sinks: number of first tokens that always stay; 0 as in the paper."""

    sinks: int = 0
    window: int = 32
    pool: int = 7
    kind: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("window", self.window, 1)
        check_least("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd: as many neighbours on either side")


@dataclass
class SnapKVState(KeptState):
    """queries_BNWH: the last W queries of the prompt, the newest last; none once it has ended."""

    queries_BNWH: Tensor


@CACHES.register("snapkv")
class SnapKVCache(TailedCache):
    """Keeps what the observation window attends to."""

    source = "Li et al. 2024, arXiv 2404.14469, section 4"
    Config: ClassVar[type] = SnapKVConfig
    observes = True

    @property
    def lossless(self) -> bool:
        return bool(self.config.lossless)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.lossless else frozenset({"tables"})

    def budgets(self, lengths_B: Tensor) -> Tensor:
        """budgets_B: tokens kept of each prompt."""
        return asked_tokens(lengths_B, self.config.ratio, self.config.max_tokens, cc.least_kept(self.config))

    def why_whole(self, prompt: int, context: int) -> str:
        if self.lossless:
            return super().why_whole(prompt, context)
        kept = int(self.budgets(torch.tensor([prompt]))[0])
        return f"{self.describe()} keeps {kept} tokens of a prompt of {prompt}, and what is generated"

    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> SnapKVState:
        observed = 0 if self.lossless or ended else size.num_heads
        return SnapKVState(
            **cc.empty_tail(self, size, tail),
            kept=Kept(**kept_columns(size, prefix, size.head_dim, size.head_dim)),
            held_B=size.zeros(dtype=torch.int64),
            queries_BNWH=size.zeros(observed, min(self.config.window, tail), size.head_dim),
        )

    def shrink(self, layer: CachedLayer) -> SnapKVState:
        state: SnapKVState = layer.state
        lengths_B, budgets_B = layer.lengths_B, self.budgets(layer.lengths_B)
        if bool((lengths_B <= budgets_B).all()):
            return state
        first_B = torch.maximum(lengths_B - self.config.window, state.starts_B)
        entries = state.entries(lengths_B)
        keys = entries["keys"]
        positions_BKS = entries["positions"].expand(keys.shape[:3])
        before = (positions_BKS >= 0) & (positions_BKS < first_B[:, None, None])
        # The window stays in any case; its own attention must not be smoothed into its neighbours.
        seen = self._seen(layer, keys, entries["positions"]).masked_fill(~before, 0.0)
        rank = smoothed(seen, self.config.pool, self.config.kind)
        rank = rank.masked_fill(positions_BKS < self.config.sinks, torch.inf)
        order = rank.masked_fill(~before, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        room_B = torch.where(lengths_B <= budgets_B, lengths_B, budgets_B - (lengths_B - first_B))
        within = torch.arange(order.shape[2], device=order.device) < room_B[:, None, None]
        keep = torch.zeros_like(before).scatter_(-1, order, within.expand_as(order)) & before
        merged = evict_merge(
            keys,
            entries["values"],
            keep_BKS=keep,
            evict_BKS=before & ~keep,
            slots=int(keep.sum(-1).max()),
            rule=MergeRule(kind="drop"),
            threshold_BK=torch.zeros(keep.shape[:2], dtype=accumulation_dtype(keys.dtype), device=keep.device),
            impl=layer.score_function.impl,
        )
        tail = cut_tail(state, first_B, lengths_B)
        kept = packed(state.kept, merged, entries)
        return replace(state, kept=kept, held_B=keep[:, 0].sum(-1), tail=tail, starts_B=first_B)

    def _seen(self, layer: CachedLayer, keys_BKSH: Tensor, positions_BKS: Tensor) -> Tensor:
        """accumulated_BKS of the observed queries; padding, at negative positions, sees nothing."""
        queries, score_function = layer.state.queries_BNWH, layer.score_function
        at_BW = layer.lengths_B[:, None] + torch.arange(-queries.shape[2], 0, device=keys_BKSH.device)
        mask = Mask(query_positions_BT=at_BW, key_positions_BKS=positions_BKS)
        tables = score_function.tables(mask, queries.shape[2])
        return accumulated_attention(queries, keys_BKSH, mask=mask, tables=tables, impl=score_function.impl)

    def compressed_nbytes(self, size: CacheSize, prompt: int, *, tokens: int = 0, joinable: bool = False) -> int:
        budget = prompt if self.lossless else int(self.budgets(torch.tensor([prompt]))[0])
        kept, tail = budget - self.config.window, cc.pages(self.config.window + tokens)
        if prompt <= budget:
            # The whole prompt is kept; later tokens take whole pages.
            kept, tail = 0, prompt if tokens == 0 else cc.pages(prompt + tokens)
        return self.empty(replace(size, device="meta"), tail=tail, prefix=kept, ended=True).nbytes()


def smoothed(accumulated_BKS: Tensor, pool: int, kind: Literal["mean", "max"]) -> Tensor:
    """accumulated_BKS pooled over `pool` tokens, an odd number, with padding (mean: 0, max: -inf) at the ends."""
    pooled = F.avg_pool1d if kind == "mean" else F.max_pool1d
    return pooled(accumulated_BKS, pool, stride=1, padding=pool // 2)
