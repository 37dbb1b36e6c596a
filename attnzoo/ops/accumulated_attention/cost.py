"""Bytes and FLOPs of accumulated attention, the column sums of attention's weights."""

from dataclasses import dataclass

from attnzoo.ops.common.cost import OpCost

INDEX, SUM = 8, 4
"""Bytes of a position, and of a number in the accumulation dtype of float32 and narrower."""


@dataclass(frozen=True, kw_only=True)
class AccumulatedSizes:
    """pairs: number of (query, visible key) per head and sequence; None: queries are the newest of `slots` tokens.
    width: bytes per element. position_heads: heads of the key positions (0: the parallel form, without positions).
    table_rows: rows of the tables of relative positions. sums_known: whether the sums of rows are given, so that scores
    are computed once instead of twice.
    """

    batch: int
    tokens: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    pairs: int | None = None
    position_heads: int = 0
    merge_counts: bool = False
    table_rows: int = 0
    sums_known: bool = False


def accumulated_cost(sizes: AccumulatedSizes) -> OpCost:
    pairs = sizes.pairs
    if pairs is None:
        pairs = sizes.tokens * (sizes.slots - sizes.tokens) + sizes.tokens * (sizes.tokens + 1) // 2
    read = sizes.batch * (sizes.heads * sizes.tokens + sizes.kv_heads * sizes.slots) * sizes.head_dim * sizes.width
    if sizes.position_heads:
        read += sizes.batch * INDEX * (sizes.tokens + sizes.position_heads * sizes.slots)
    if sizes.merge_counts:
        read += sizes.batch * sizes.kv_heads * sizes.slots * SUM
    if sizes.sums_known:
        read += sizes.batch * sizes.heads * sizes.tokens * SUM
    flops = 2 * sizes.batch * sizes.heads * pairs * sizes.head_dim * (1 if sizes.sums_known else 2)
    if sizes.table_rows:
        read += sizes.heads * (sizes.table_rows * (sizes.head_dim + 1) + sizes.head_dim) * sizes.width
        flops += 2 * sizes.batch * sizes.heads * sizes.tokens * min(sizes.table_rows, sizes.slots) * sizes.head_dim
    return OpCost(bytes_read=read, bytes_written=sizes.batch * sizes.kv_heads * sizes.slots * SUM, flops=flops)
