"""Estimates the time of a decode step on a chip: the larger of bytes / bandwidth and FLOPs / peak FLOP/s.

This is a model, not a measurement. It counts the weights once a step, two FLOPs per weight and token, and the bytes and
FLOPs of attention and merging (`attnzoo.ops.paged_decode.cost`, `attnzoo.ops.evict_merge.cost`). It leaves out kernel
launches, writing new keys, choosing the tokens to evict, and imperfect overlap. So real speed-ups of short steps are
smaller.
"""

from dataclasses import dataclass
from typing import Any

from attnzoo.kvcache.base import caches_of
from attnzoo.kvcache.compressed import CompressedState
from attnzoo.kvcache.entries import KeptState
from attnzoo.kvcache.eviction import EvictingState
from attnzoo.kvcache.full import FullCacheState
from attnzoo.kvcache.merging import D2OState
from attnzoo.models import DecoderLM
from attnzoo.ops.common.cost import OpCost
from attnzoo.ops.evict_merge.cost import step_cost as merge_step_cost
from attnzoo.ops.paged_decode.cost import DecodeSizes, SegmentSizes, decode_cost
from attnzoo.planner.chips import Chip
from attnzoo.types import dtype_bytes


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The bytes moved and the FLOPs of one decode step of all sequences."""

    nbytes: int
    flops: int

    def seconds(self, chip: Chip, precision: str = "bf16") -> float:
        """Seconds of the step on a chip, by the roofline."""
        return max(self.nbytes / chip.bandwidth, self.flops / chip.flops(precision))


def step_cost(*, weight_bytes: int, weights: int, attention: OpCost, batch: int) -> StepCost:
    """The cost of a step of `batch` sequences. weight_bytes: weights read in a step. weights: number of parameters in
    matrix products. attention: cost of attention in all layers and sequences."""
    return StepCost(nbytes=weight_bytes + attention.bytes_moved, flops=batch * 2 * weights + attention.flops)


def attention_cost(model: DecoderLM, state: Any, batch: int) -> OpCost:
    """The cost of attention and merging in the next step of `batch` sequences with the state `state`, in all layers.
    Layers without keys are not counted."""
    costs = []
    for block, layer in zip(model.layers(), state.layers, strict=True):
        for kept, cache in zip(block.attention.kv_layers(), caches_of(layer), strict=True):
            if isinstance(cache, FullCacheState | CompressedState):
                costs += _layer_costs(cache, kept.num_heads, int(layer.lengths_B.max()) + 1, batch)
    return OpCost(
        bytes_read=sum(cost.bytes_read for cost in costs),
        bytes_written=sum(cost.bytes_written for cost in costs),
        flops=sum(cost.flops for cost in costs),
    )


def _layer_costs(state: FullCacheState | CompressedState, heads: int, length: int, batch: int) -> list[OpCost]:
    """The costs of one layer with `length` tokens, including the new one."""
    if isinstance(state, FullCacheState):
        return [_decode_cost(state, (_whole(length, state.keys_BKSH.shape[3]),), heads, batch)]
    prefix, (kv_heads, head_dim) = state.compressed(), state.heads
    ring = state.ring.slots if isinstance(state, EvictingState) else 0
    tail = _whole(ring or length - int(state.starts_B.min()), head_dim)
    if state.slots == 0:
        return [_decode_cost(state.tail, (tail,), heads, batch)]
    width = dtype_bytes(prefix.keys_BKSC.dtype)
    key_dim, value_dim = prefix.keys_BKSC.shape[3], prefix.values_BKSV.shape[3]
    part = SegmentSizes(
        slots=prefix.slots,
        key_dim=key_dim,
        value_dim=value_dim,
        position_heads=kv_heads if isinstance(state, KeptState) else 1,
        merge_counts=prefix.log_counts_BKS is not None,
        channels=key_dim < head_dim,
        value_channels=value_dim < head_dim,
    )
    d2o = ring > 0 and isinstance(state, D2OState)
    merges = d2o and state.policy.config.merge
    options = {
        "probe_dim": key_dim if merges else 0,
        "accumulated_attention": d2o,
    }
    costs = [_decode_cost(state.tail, (part, tail), heads, batch, **options)]
    if merges:
        sizes = {"slots": prefix.slots, "key_dim": key_dim, "value_dim": value_dim, "width": width}
        costs.append(merge_step_cost(batch=batch, kv_heads=kv_heads, merge_counts=part.merge_counts, **sizes))
    return costs


def _whole(slots: int, head_dim: int) -> SegmentSizes:
    return SegmentSizes(slots=slots, key_dim=head_dim, value_dim=head_dim, position_heads=1)


def _decode_cost(
    like: FullCacheState, segments: tuple[SegmentSizes, ...], heads: int, batch: int, **options: Any
) -> OpCost:
    """The cost of attention over `segments`. like: a full cache with the layer's kv heads, head_dim and dtype."""
    _, kv_heads, _, head_dim = like.keys_BKSH.shape
    return decode_cost(
        DecodeSizes(
            batch=batch,
            tokens=1,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            width=dtype_bytes(like.keys_BKSH.dtype),
            segments=segments,
            **options,
        )
    )
