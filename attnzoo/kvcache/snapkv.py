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
from attnzoo.kvcache.base import CACHES, CachedLayer, CacheView, Need
from attnzoo.kvcache.budgets import asked_tokens
from attnzoo.kvcache.compressed import CompressedState, Prefix
from attnzoo.kvcache.options import TokenOptions, check_least
from attnzoo.kvcache.tailed import TailedCache, cut_tail
from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import MergeRule, evict_merge
from attnzoo.types import accumulation_dtype, dtype_bytes


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


@CACHES.register("snapkv")
class SnapKVCache(TailedCache):
    """Keeps what the observation window attends to."""

    source = "Li et al. 2024, arXiv 2404.14469, section 4"
    Config: ClassVar[type] = SnapKVConfig
    observes = True

    @property
    def lossless(self) -> bool:
        return bool(self.config.lossless)

    def budgets(self, lengths_B: Tensor) -> Tensor:
        if self.lossless:
            return lengths_B.clone()
        return asked_tokens(lengths_B, self.config.ratio, self.config.max_tokens, cc.least_kept(self.config))

    def why_whole(self, prompt: int, context: int) -> str:
        if self.lossless:
            return super().why_whole(prompt, context)
        kept = int(self.budgets(torch.tensor([prompt]))[0])
        return f"{self.describe()} keeps {kept} tokens of a prompt of {prompt}, and what is generated"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.lossless else frozenset({"tables"})

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
        places = state.starts_B.new_zeros(batch, num_kv_heads, 0, dtype=torch.int32)
        return state if self.lossless else replace(state, prefix=replace(state.prefix, places_BKP=places))

    def shrink(self, layer: CachedLayer) -> CompressedState:
        state, lengths_B, budgets_B = layer.state, layer.lengths_B, self.budgets(layer.lengths_B)
        if bool((lengths_B <= budgets_B).all()):
            return state
        first_B = torch.maximum(lengths_B - self.config.window, state.starts_B)
        view = self._entries(state, lengths_B)
        kv_heads = view.keys_BKSH.shape[1]
        places = view.positions_BKS.expand(-1, kv_heads, -1)
        before = (places >= 0) & (places < first_B[:, None, None])
        # The window stays in any case; its own attention must not be smoothed into its neighbours.
        seen = self._seen(layer, view).masked_fill(~before, 0.0)
        rank = smoothed(seen, self.config.pool, self.config.kind)
        rank = rank.masked_fill(places < self.config.sinks, torch.inf)
        order = rank.masked_fill(~before, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        room_B = torch.where(lengths_B <= budgets_B, lengths_B, budgets_B - (lengths_B - first_B))
        within = torch.arange(order.shape[2], device=order.device) < room_B[:, None, None]
        keep = torch.zeros_like(before).scatter_(-1, order, within.expand_as(order)) & before
        merged = evict_merge(
            view.keys_BKSH,
            view.values_BKSH,
            keep_BKS=keep,
            evict_BKS=before & ~keep,
            slots=int(keep.sum(-1).max()),
            rule=MergeRule(kind="drop"),
            threshold_BK=torch.zeros(
                keep.shape[:2], dtype=accumulation_dtype(view.keys_BKSH.dtype), device=keep.device
            ),
            impl=layer.score_function.impl,
        )
        empty = merged.source_BKM < 0
        kept = places.gather(-1, merged.source_BKM.clamp(min=0)).masked_fill(empty, -1)
        prefix = Prefix(merged.keys_BKMC, merged.values_BKMV, places_BKP=(kept + 1).to(torch.int32))
        return replace(state, prefix=prefix, tail=cut_tail(state, first_B, lengths_B), starts_B=first_B)

    def _entries(self, state: CompressedState, lengths_B: Tensor) -> CacheView:
        used = int((lengths_B - state.starts_B).max())
        at_BS = state.starts_B[:, None] + torch.arange(used, device=lengths_B.device)
        places = torch.where(at_BS < lengths_B[:, None], at_BS, -1)[:, None]
        tail = CacheView(state.tail.keys_BKSH[:, :, :used], state.tail.values_BKSH[:, :, :used], places)
        return tail if state.prefix.slots == 0 else cc.joined(state, tail)

    def _seen(self, layer: CachedLayer, view: CacheView) -> Tensor:
        """accumulated_BKS of the observed queries; padding, at negative positions, sees nothing."""
        steps = torch.arange(-layer.state.queries_BNWH.shape[2], 0, device=layer.lengths_B.device)
        at_BW = layer.lengths_B[:, None] + steps
        mask = Mask(query_positions_BT=at_BW, key_positions_BKS=view.positions_BKS)
        tables = layer.score_function.tables(mask, len(steps))
        return accumulated_attention(
            layer.state.queries_BNWH, view.keys_BKSH, mask=mask, tables=tables, impl=layer.score_function.impl
        )

    def compressed_nbytes(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        prompt: int,
        dtype: torch.dtype,
        *,
        tokens: int = 0,
        joinable: bool = False,
    ) -> int:
        budget = int(self.budgets(torch.tensor([prompt]))[0])
        if self.lossless or prompt <= budget:
            # The whole prompt is kept; later tokens take whole pages.
            slots = prompt if tokens == 0 else cc.pages(prompt + tokens)
            return self.nbytes(batch, num_kv_heads, head_dim, slots, dtype)
        whole = 2 * head_dim * dtype_bytes(dtype)
        slots = cc.pages(self.config.window + tokens)
        prefix = budget - self.config.window
        return batch * (num_kv_heads * (prefix * (whole + 4) + slots * whole) + 16)


def smoothed(accumulated_BKS: Tensor, pool: int, kind: Literal["mean", "max"]) -> Tensor:
    """accumulated_BKS pooled over `pool` tokens, an odd number, with padding (mean: 0, max: -inf) at the ends."""
    pooled = F.avg_pool1d if kind == "mean" else F.max_pool1d
    return pooled(accumulated_BKS, pool, stride=1, padding=pool // 2)
