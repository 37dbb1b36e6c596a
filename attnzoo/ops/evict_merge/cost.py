"""Bytes and FLOPs of evicting and merging entries of a cache. Sizes are a kv head's; all kv heads are alike."""

from dataclasses import dataclass

from attnzoo.ops.cost import OpCost

INDEX, SUM = 8, 4
"""Bytes of a slot's number, and of a number in the accumulation dtype of float32 and narrower."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of `entries`, `kept` stay in `slots` slots and `evicted` leave, `merged` of them into a kept one; the others hold
    nothing."""

    entries: int
    kept: int
    evicted: int
    merged: int
    slots: int


def merge_cost(
    counts: Counts, *, batch: int, kv_heads: int, key_dim: int, value_dim: int, width: int, votes: bool = False
) -> OpCost:
    """Rows that are dropped are read as far as their keys, to find out. merged=0 with evicted=0: the rule drops."""
    kept, evicted, merged = counts.kept, counts.evicted, counts.merged
    rows = (kept + evicted) * key_dim + (kept + merged) * value_dim
    read = rows * width + 2 * counts.entries + SUM + (counts.entries * SUM if votes else 0)
    written = counts.slots * ((key_dim + value_dim) * width + INDEX + (SUM if votes else 0)) + SUM
    mixed = (merged + min(kept, merged)) * (key_dim + value_dim)
    flops = 2 * kept * evicted * key_dim + 2 * mixed
    heads = batch * kv_heads
    return OpCost(bytes_read=heads * read, bytes_written=heads * written, flops=heads * flops)


def step_cost(
    *, batch: int, kv_heads: int, slots: int, key_dim: int, value_dim: int, width: int, votes: bool = False
) -> OpCost:
    """One victim that merges and one arrival that takes its slot: the norms and dots of all slots, and three rows. All
    numbers of slots are counted, of which a step changes three."""
    row = (key_dim + value_dim) * width
    read = slots * (width + SUM) + 3 * row + 2 * INDEX + SUM + (2 * SUM if votes else 0)
    written = 2 * row + 3 * width + SUM + (2 * SUM if votes else 0)
    flops = 2 * 2 * (key_dim + value_dim)
    heads = batch * kv_heads
    return OpCost(bytes_read=heads * read, bytes_written=heads * written, flops=heads * flops)
