"""ThinK: prunes the channels of keys that matter least to the products with queries.

Source: Xu et al. 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning" (arXiv 2407.21018), section 3. Every kv head
keeps its channels of the highest score (see `channels`), by the queries of the last `window` tokens. The keys of these
tokens and of all generated ones keep all channels.

Values may lose channels too (value_channel_ratio, off by default): value_score="output" is the paper's appendix D,
score_d = ||A[-W:] V[:, d]||_F^2 with the softmax weights A of the last W queries, before the output map, summed over
the query heads of a kv head; "norm" is sum_s v_sd^2, without the attention.

For long generations, repack_every=n prunes the tail again whenever it has n tokens more than the window. mask="kept"
uses the channels chosen at the prompt's end (as the authors' quantised variant does). mask="recomputed" chooses again
at every pruning, one mask per kv head for all pruned entries: the channels whose loss would change Q K^T most, by the
last W queries and the keys as they are stored now (values: sum_s v_sd^2). A channel that an entry has lost counts as
zero and does not come back; a channel that the new mask drops is removed from older entries too. So entries need no
index of their own, and a pruning costs one pass over them.

Differs from the paper: with grouped kv heads, scores sum over all query heads of a kv head, and keys are stored once
per kv head; score="greedy" uses the whole quadratic form; the tail can be pruned again. In relative attention, position
terms use all channels of the query.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, CachedLayer, CacheSize, CacheView, Need, ScoreFunction
from attnzoo.kvcache.channels import (
    best_channels,
    change_channels,
    channel_scores,
    greedy_scores,
    grouped,
    kept_channels,
    squares,
    stored_squares,
    take_channels,
)
from attnzoo.kvcache.compressed import CompressedState, filled_tail
from attnzoo.kvcache.options import ChannelOptions, Prefill, check_least
from attnzoo.kvcache.tailed import TailedCache, cut_tail
from attnzoo.ops.paged_decode import Entries


@dataclass(frozen=True, kw_only=True)
class ThinKConfig(ChannelOptions):
    """score: scores of key channels, "think" (equation 6) or "greedy" (removed one by one). value_score: scores of
    value channels, "norm" or "output" (what the last queries read). repack_every: number of tokens beyond the window at
    which the tail is pruned again, None: never. prefill: "stream" prunes after every chunk of the prompt. mask:
    channels of later prunings, those "kept" from the first one or "recomputed"."""

    score: Literal["think", "greedy"] = "think"
    value_score: Literal["norm", "output"] = "norm"
    repack_every: int | None = None
    mask: Literal["kept", "recomputed"] = "kept"
    prefill: Prefill = "oneshot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repack_every is not None:
            check_least("repack_every", self.repack_every, 1)
        if self.value_score == "output" and self.value_channel_ratio == 1.0:
            raise ValueError(
                "value_score='output' is unused, as value_channel_ratio=1.0 prunes no values: set it below 1"
            )
        if self.mask == "kept":
            return
        if self.repack_every is None and self.prefill == "oneshot":
            raise ValueError("mask='recomputed' needs a second pruning: set repack_every, or prefill='stream'")
        if self.score == "greedy":
            raise ValueError(
                "mask='recomputed' observes sums of squares of queries, and score='greedy' needs their products: "
                "set score='think'"
            )
        if self.value_score == "output":
            raise ValueError(
                "mask='recomputed' observes sums of squares of queries, and value_score='output' needs their "
                "attention: set value_score='norm'"
            )


@dataclass
class PrunedState(CompressedState):
    """The pruned entries: slot s holds position s, up to where the tail starts. channels_BKC, value_channels_BKV
    (int64): the channels stored of their keys and values; [B, K, 0] means all."""

    keys_BKPC: Tensor
    values_BKPV: Tensor
    channels_BKC: Tensor
    value_channels_BKV: Tensor

    @property
    def slots(self) -> int:
        return self.keys_BKPC.shape[2]

    def held(self) -> Tensor:
        return self.starts_B

    def positions(self) -> Tensor:
        return torch.arange(self.slots, device=self.starts_B.device).expand(len(self.starts_B), 1, -1)

    def compressed(self) -> Entries:
        return Entries(
            keys_BKSC=self.keys_BKPC,
            values_BKSV=self.values_BKPV,
            positions_BKS=None,
            channels_BKC=cc.stored(self.channels_BKC),
            value_channels_BKV=cc.stored(self.value_channels_BKV),
        )


@dataclass
class ThinKState(PrunedState):
    """queries_BNWH: the last W queries, the newest last. Once the prompt has ended, those of each kv head `condensed`
    where later prunings need them, else none."""

    queries_BNWH: Tensor


@CACHES.register("think")
class ThinKCache(TailedCache):
    """Keeps all tokens, with fewer channels of their keys."""

    source = "Xu et al. 2024, arXiv 2407.21018, section 3"
    Config: ClassVar[type] = ThinKConfig
    observes = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.one_by_one = config.repack_every is not None
        self.recomputes = getattr(config, "mask", "kept") == "recomputed"
        self.follows = self.recomputes and config.repack_every is not None

    @property
    def lossless(self) -> bool:
        return bool(self.config.channel_ratio == 1.0 and self.config.value_channel_ratio == 1.0)

    def why_whole(self, prompt: int, context: int) -> str:
        if self.lossless:
            return super().why_whole(prompt, context)
        if prompt > self.config.window:
            return f"{self.describe()} keeps all channels of a head of this size; a smaller channel_ratio drops one"
        return (
            f"{self.describe()} leaves the newest {self.config.window} tokens of a prompt and what is generated whole, "
            f"and the prompt has {prompt}"
        )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.lossless else frozenset({"terms"})

    def scores(self, state: Any, keys_BKSH: Tensor, held_BKS: Tensor, before_BKH: Tensor) -> Tensor:
        """score_BKH of the key channels. before_BKH: sums of squares of the keys that have been pruned already."""
        if self.config.score == "greedy":  # chooses once, when nothing has been pruned
            return greedy_scores(state.queries_BNWH, keys_BKSH, held_BKS)
        return channel_scores(state.queries_BNWH, keys_BKSH, held_BKS, before_BKH)

    def value_scores(self, layer: CachedLayer, tail: CacheView, before_BKH: Tensor) -> Tensor:
        """score_BKH of the value channels."""
        if getattr(self.config, "value_score", "norm") == "output":
            return output_scores(layer, tail)
        return squares(tail.values_BKSH, tail.positions_BKS >= 0) + before_BKH

    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> PrunedState:
        heads, width = size.num_heads, min(self.config.window, tail)
        if ended:
            heads, width = size.num_kv_heads if self.follows else 0, self.config.window
        queries = size.zeros(0 if self.lossless else heads, width, size.head_dim)
        return ThinKState(**self.parts(size, tail, prefix, ended), queries_BNWH=queries)

    def parts(self, size: CacheSize, tail: int, prefix: int, ended: bool) -> dict[str, Any]:
        """The fields of `PrunedState`."""
        whole = size.head_dim
        widths = self._widths(whole) if ended else (whole, whole)
        chosen = [width if width < whole else 0 for width in widths]
        return {
            **cc.empty_tail(self, size, tail),
            "keys_BKPC": size.heads(prefix, widths[0]),
            "values_BKPV": size.heads(prefix, widths[1]),
            "channels_BKC": size.heads(chosen[0], dtype=torch.int64),
            "value_channels_BKV": size.heads(chosen[1], dtype=torch.int64),
        }

    def before_append(self, state: Any, score_function: ScoreFunction, lengths_B: Tensor) -> Any:
        repack_every = self.config.repack_every
        if repack_every is None or self.lossless or state.reading:
            return state
        long_B = lengths_B - state.starts_B >= self.config.window + repack_every
        if not bool(long_B.any()):
            return state
        # Only the long sequences: what happens to one does not depend on the others of its batch.
        ends_B = torch.where(long_B, lengths_B - self.config.window, state.starts_B)
        return self._pruned(CachedLayer(state, score_function, lengths_B), ends_B)

    def shrink(self, layer: CachedLayer) -> Any:
        ends_B = torch.maximum(layer.lengths_B - self.config.window, layer.state.starts_B)
        return self._pruned(layer, ends_B)

    def _pruned(self, layer: CachedLayer, ends_B: Tensor) -> Any:
        """Prunes what the tail holds before position ends_B and moves it into the prefix. The first call chooses the
        channels, even if there is nothing to prune yet."""
        state, starts_B = layer.state, layer.state.starts_B
        tail = filled_tail(state, layer.lengths_B)
        masks = state.channels_BKC, state.value_channels_BKV
        keys, values = state.keys_BKPC, state.values_BKPV
        if cc.stored(masks[0]) is None and cc.stored(masks[1]) is None:
            masks = self.masks(layer, tail)
        elif self.recomputes:
            moved_B11 = (ends_B > starts_B)[:, None, None]
            new = self.masks(layer, tail)
            masks = torch.where(moved_B11, new[0], masks[0]), torch.where(moved_B11, new[1], masks[1])
            keys = _changed(keys, state.channels_BKC, masks[0], tail)
            values = _changed(values, state.value_channels_BKV, masks[1], tail)
        return replace(
            state,
            keys_BKPC=_joined(keys, thin(tail.keys_BKSH, masks[0]), starts_B, ends_B),
            values_BKPV=_joined(values, thin(tail.values_BKSH, masks[1]), starts_B, ends_B),
            channels_BKC=masks[0],
            value_channels_BKV=masks[1],
            tail=cut_tail(state, ends_B, layer.lengths_B),
            starts_B=ends_B,
        )

    def masks(self, layer: CachedLayer, tail: CacheView) -> tuple[Tensor, Tensor]:
        """(channels_BKC, value_channels_BKV) for all entries of the layer; [B, K, 0] where all channels stay."""
        state, head_dim = layer.state, tail.keys_BKSH.shape[3]
        channels = values = state.channels_BKC.new_zeros(*tail.keys_BKSH.shape[:2], 0)
        kept, kept_values = self._widths(head_dim)
        if kept < head_dim:
            before = stored_squares(state.keys_BKPC, state.channels_BKC, head_dim)
            held = tail.positions_BKS >= 0
            channels = best_channels(self.scores(state, tail.keys_BKSH, held, before), kept)
        if kept_values < head_dim:
            before = stored_squares(state.values_BKPV, state.value_channels_BKV, head_dim)
            values = best_channels(self.value_scores(layer, tail, before), kept_values)
        return channels, values

    def _widths(self, head_dim: int) -> tuple[int, int]:
        """Channels of a pruned key and value."""
        return kept_channels(head_dim, self.config.channel_ratio), kept_channels(
            head_dim, self.config.value_channel_ratio
        )

    def compressed_nbytes(self, size: CacheSize, prompt: int, *, tokens: int = 0, joinable: bool = False) -> int:
        if self.lossless:
            return self.nbytes(size, prompt if tokens == 0 else cc.pages(prompt + tokens))
        window, repack_every = self.config.window, self.config.repack_every
        tail = min(prompt, window) + tokens
        if repack_every is not None:
            # A tail of window + repack_every tokens is pruned to the window just before the next token is appended.
            tail -= max(0, tail - window - 1) // repack_every * repack_every
        pruned, slots = prompt + tokens - tail, cc.pages(max(1, tail))
        return self.empty(replace(size, device="meta"), tail=slots, prefix=pruned, ended=True).nbytes()


def output_scores(layer: CachedLayer, tail: CacheView) -> Tensor:
    """score_BKH of value channels by what the last queries read, ||A[-W:] V[:, d]||_F^2, before there is a prefix."""
    queries, lengths_B = layer.state.queries_BNWH, layer.lengths_B
    positions_BW = lengths_B[:, None] + torch.arange(-queries.shape[2], 0, device=lengths_B.device)
    o_BNWH = layer.score_function.attend(queries, tail, positions_BW.clamp(min=0))
    # A short prompt has fewer queries than the window has room for.
    o_BNWH = o_BNWH.masked_fill((positions_BW < 0)[:, None, :, None], 0.0)
    return grouped(o_BNWH, tail.keys_BKSH.shape[1]).square().sum(2)


def _changed(x_BKPC: Tensor, before_BKC: Tensor, after_BKC: Tensor, tail: CacheView) -> Tensor:
    return (
        x_BKPC
        if cc.stored(before_BKC) is None
        else change_channels(x_BKPC, before_BKC, after_BKC, tail.keys_BKSH.shape[3])
    )


def thin(x_BKSH: Tensor, channels_BKC: Tensor) -> Tensor:
    """x_BKSC: the given channels of x, or all of x where none are given."""
    if cc.stored(channels_BKC) is None:
        return x_BKSH
    return take_channels(x_BKSH, channels_BKC)


def _joined(prefix_BKPC: Tensor, tail_BKSC: Tensor, starts_B: Tensor, ends_B: Tensor) -> Tensor:
    """Entries of positions 0..ends_B-1 in slots of these numbers: up to starts_B from the prefix, then the tail."""
    slots_P = torch.arange(int(ends_B.max()), device=starts_B.device)
    gone_BP = slots_P >= ends_B[:, None]
    if prefix_BKPC.shape[2] == 0:
        return tail_BKSC[:, :, : len(slots_P)].masked_fill(gone_BP[:, None, :, None], 0.0)
    both = torch.cat([prefix_BKPC, tail_BKSC], dim=2)
    index_BP = torch.where(slots_P < starts_B[:, None], slots_P, prefix_BKPC.shape[2] + slots_P - starts_B[:, None])
    index_BP = index_BP.clamp(max=both.shape[2] - 1)
    rows = both.gather(2, index_BP[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))
    return rows.masked_fill_(gone_BP[:, None, :, None], 0.0)
