"""Bytes and FLOPs of the column sums of attention."""

from attnzoo.ops.cost import HeadSizes, OpCost

INDEX, SUM = 8, 4
"""Bytes of a position, and of a number in the accumulation dtype of float32 and narrower."""


def mass_cost(
    sizes: HeadSizes,
    *,
    slots: int,
    pairs: int | None = None,
    position_heads: int = 0,
    votes: bool = False,
    table_rows: int = 0,
    sums_known: bool = False,
) -> OpCost:
    """pairs: of a query and a key that it sees, a head and sequence; None: queries are the newest of `slots` tokens.
    position_heads: of key positions (0: the parallel form, without any). table_rows: rows
    of the tables of relative positions, in `width` as well. sums_known: the sums of rows come from elsewhere, and
    scores are computed once instead of twice.
    """
    batch, tokens, heads, kv_heads = sizes.batch, sizes.tokens, sizes.heads, sizes.kv_heads
    head_dim, width = sizes.head_dim, sizes.width
    if pairs is None:
        pairs = tokens * (slots - tokens) + tokens * (tokens + 1) // 2
    read = batch * (heads * tokens + kv_heads * slots) * head_dim * width
    if position_heads:
        read += batch * INDEX * (tokens + position_heads * slots)
    if votes:
        read += batch * kv_heads * slots * SUM
    if sums_known:
        read += batch * heads * tokens * SUM
    flops = 2 * batch * heads * pairs * head_dim * (1 if sums_known else 2)
    if table_rows:
        read += heads * (table_rows * (head_dim + 1) + head_dim) * width
        flops += 2 * batch * heads * tokens * min(table_rows, slots) * head_dim
    return OpCost(bytes_read=read, bytes_written=batch * kv_heads * slots * SUM, flops=flops)
