"""Bytes and FLOPs of evicting and merging entries of a cache. Sizes are a kv head's; all kv heads are alike."""

from dataclasses import dataclass

from attnzoo.ops.common.cost import OpCost

INDEX, SUM = 8, 4
"""Bytes of a slot's number, and of a number in the accumulation dtype of float32 and narrower."""


@dataclass(frozen=True, kw_only=True)
class MergeSizes:
    """Of `entries`, `kept` stay in `slots` slots and `evicted` leave, `merged` of them into a kept one; the others hold
    nothing. Rows that are dropped are read as far as their keys, to find out. merged=0 with evicted=0: the rule drops.
    """

    batch: int
    kv_heads: int
    entries: int
    kept: int
    evicted: int
    merged: int
    slots: int
    key_dim: int
    value_dim: int
    width: int
    merge_counts: bool = False


def merge_cost(sizes: MergeSizes) -> OpCost:
    rows = (sizes.kept + sizes.evicted) * sizes.key_dim + (sizes.kept + sizes.merged) * sizes.value_dim
    read = rows * sizes.width + 2 * sizes.entries + SUM + (sizes.entries * SUM if sizes.merge_counts else 0)
    written = (
        sizes.slots * ((sizes.key_dim + sizes.value_dim) * sizes.width + INDEX + (SUM if sizes.merge_counts else 0))
        + SUM
    )
    mixed = (sizes.merged + min(sizes.kept, sizes.merged)) * (sizes.key_dim + sizes.value_dim)
    flops = 2 * sizes.kept * sizes.evicted * sizes.key_dim + 2 * mixed
    heads = sizes.batch * sizes.kv_heads
    return OpCost(bytes_read=heads * read, bytes_written=heads * written, flops=heads * flops)


def step_cost(
    *, batch: int, kv_heads: int, slots: int, key_dim: int, value_dim: int, width: int, merge_counts: bool = False
) -> OpCost:
    """One victim that merges and one arrival that takes its slot: the norms and dots of all slots, and three rows. All
    numbers of slots are counted, of which a step changes three."""
    row = (key_dim + value_dim) * width
    read = slots * (width + SUM) + 3 * row + 2 * INDEX + SUM + (2 * SUM if merge_counts else 0)
    written = 2 * row + 3 * width + SUM + (2 * SUM if merge_counts else 0)
    flops = 2 * 2 * (key_dim + value_dim)
    heads = batch * kv_heads
    return OpCost(bytes_read=heads * read, bytes_written=heads * written, flops=heads * flops)
