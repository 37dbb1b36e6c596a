"""Tiles shared by the kernels of relative attention.

Tensors of tokens lie in memory as [B, T, heads, H]. All tiles are square, BLOCK queries by BLOCK keys. `WIDTH` is the
head dim rounded up to a power of two; the channels beyond HEAD_DIM are loaded as zeros.

The relative term of a tile. Let b = query block - key block. The distances of the tile, b * BLOCK + m - n, belong to
two blocks of the table: b where n <= m, and b - 1 above that diagonal. With the product L_b = Q R_b^T + S_b of the
queries and the table's block b, column c of X = where(c <= m, L_b, L_{b-1}) is distance (b or b - 1) * BLOCK + c, so
that the tile's relative term is X[m, (m - n) mod BLOCK]: one gather along the row, called skew here. It is its own
inverse ((m - (m - n)) = n), so gradients come back by the same skew.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class KeyLimits(NamedTuple):
    """What a mask and a table say in numbers. starts [B, T] and prefix [B] in int32, exists [B, S] in int8, as in
    `Mask`, or None; entries: the number of keys; future: rows of the table for keys after the query, None for 0."""

    starts: Any
    prefix: Any
    exists: Any
    entries: Any
    future: Any


class MaskKind(NamedTuple):
    """What a mask says at compile time. window: 0 for none. ahead: a query may see keys after it. partial: a query may
    see no key of a tile before it has seen any, so that its running maximum is still -inf."""

    window: int
    sinks: int
    causal: bool
    ahead: bool
    partial: bool


@triton.jit
def head_base(tensor, batch, head, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where one head begins in [B, T, heads, H]; in 64 bits, since a batch may hold more than 2^31 numbers."""
    return tensor + (tl.cast(batch, tl.int64) * tokens * HEADS + head) * HEAD_DIM


@triton.jit
def tile_addresses(base, block, STEP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of a tile's numbers, and the tile's rows and columns. What is 64 bits wide is one number a tile."""
    inside = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    first = base + tl.cast(block * BLOCK, tl.int64) * STEP
    return first + (inside * STEP + columns), block * BLOCK + inside, columns


@triton.jit
def load_tile(
    base, block, tokens, STEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """[BLOCK, WIDTH] of the head at `base`, tokens STEP apart; zeros beyond the last token and channel."""
    addresses, rows, columns = tile_addresses(base, block, STEP, BLOCK, WIDTH)
    return tl.load(addresses, mask=(rows < tokens) & (columns < HEAD_DIM), other=0.0)


@triton.jit
def store_tile(
    base, tile, block, tokens, STEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """The counterpart of load_tile; rounds to what `base` holds."""
    addresses, rows, columns = tile_addresses(base, block, STEP, BLOCK, WIDTH)
    tl.store(addresses, tile.to(base.dtype.element_ty), mask=(rows < tokens) & (columns < HEAD_DIM))


@triton.jit
def row_offset(batch, head, tokens, HEADS: tl.constexpr):
    """Where the numbers per query of one head begin in [B, N, T]."""
    return (tl.cast(batch, tl.int64) * HEADS + head) * tokens


@triton.jit
def load_rows(vector, offset, block, tokens, other, BLOCK: tl.constexpr):
    """[BLOCK] numbers per token, `other` beyond the last token."""
    rows = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(vector + offset + rows, mask=rows < tokens, other=other)


@triton.jit
def store_rows(vector, offset, values, block, tokens, BLOCK: tl.constexpr):
    rows = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(vector + offset + rows, values, mask=rows < tokens)


@triton.jit
def load_channels(vector, row, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Row `row` of a matrix with HEAD_DIM columns, in float32."""
    columns = tl.arange(0, WIDTH)
    return tl.load(vector + row * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def content_scores(query, key, key_bias, offset, block, entries, BLOCK: tl.constexpr):
    """(q + u) . k: products of a tile, plus u . k, one number a key (None without u).

    Adding u to the queries instead would keep two versions of them in registers: the table's term takes q alone.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if key_bias is not None:
        scores += load_rows(key_bias, offset, block, entries, 0.0, BLOCK)[None, :]
    return scores


@triton.jit
def table_rows(distance_block, rows, future, BLOCK: tl.constexpr):
    """Rows of the table for one block of distances: those beyond the table are its last row, or its first.

    Without rows for keys after the query, block -1 lies above the diagonal of the first tile and is hidden; any row
    will do for it.
    """
    row = distance_block * BLOCK + tl.arange(0, BLOCK)
    if future is not None:
        row += future
    return tl.maximum(tl.minimum(row, rows - 1), 0)


@triton.jit
def load_table(
    table, head, distance_block, rows, future, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """R of one block of distances: [BLOCK, WIDTH]."""
    row = head * rows + table_rows(distance_block, rows, future, BLOCK)
    columns = tl.arange(0, WIDTH)
    return tl.load(table + row[:, None] * HEAD_DIM + columns[None, :], mask=columns[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def distance_logits(
    query, table, table_bias, head, distance_block, rows, future,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """L of one block of distances, in float32: q . R[d] + S[d] for every query and distance."""
    tile = load_table(table, head, distance_block, rows, future, HEAD_DIM, BLOCK, WIDTH)
    bias = tl.load(table_bias + head * rows + table_rows(distance_block, rows, future, BLOCK)).to(tl.float32)
    return tl.dot(query, tl.trans(tile), input_precision="ieee") + bias[None, :]


@triton.jit
def far_logits(query, table, table_bias, head, rows, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """q . R[P-1] + S[P-1]: the relative term of every key at the distance of the last row or more."""
    last = load_channels(table, head * rows + rows - 1, HEAD_DIM, WIDTH)
    bias = tl.load(table_bias + head * rows + rows - 1).to(tl.float32)
    return tl.sum(query.to(tl.float32) * last[None, :], axis=1) + bias


@triton.jit
def near_blocks(rows, future, nearest, count, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The first of the blocks of distances nearest..count from which on every tile uses the table's last row alone; the
    blocks before it need the table. Where there are fewer keys than queries, no block of the last queries does."""
    if future is not None:
        rows -= future
    near = tl.minimum(count, (tl.maximum(rows - 2, 0) + BLOCK - 1) // BLOCK + 1)
    if KIND.ahead:
        near = tl.maximum(near, nearest)
    return near


@triton.jit
def on_or_below_diagonal(turns, BLOCK: tl.constexpr):
    """m >= n. `turns` as in skew."""
    inside = tl.arange(0, BLOCK) + turns
    return inside[:, None] >= inside[None, :]


@triton.jit
def skew(tile, turns, BLOCK: tl.constexpr):
    """tile[m, (m - n) mod BLOCK]; twice is the identity.

    `turns` is a multiple of BLOCK, hence without effect, that changes in every iteration and that the compiler cannot
    see through (the kernels multiply by BLOCK passed as a plain number): else it keeps one index for every number of
    the tile in registers throughout the loop, and spills for it.
    """
    inside = tl.arange(0, BLOCK)
    return tl.gather(tile, (inside[:, None] - inside[None, :] + turns) & (BLOCK - 1), axis=1)


@triton.jit
def query_rows(block, BLOCK: tl.constexpr):
    """Tokens of a block as a column."""
    return block * BLOCK + tl.arange(0, BLOCK)[:, None]


@triton.jit
def key_columns(block, BLOCK: tl.constexpr):
    """Tokens of a block as a row."""
    return block * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def key_count(limits, tokens, KIND: tl.constexpr):
    """How many keys there are: under causality as many as queries, which saves a number in a register."""
    if KIND.causal:
        return tokens
    else:
        return limits.entries


@triton.jit
def row_starts(limits, batch, block, tokens, BLOCK: tl.constexpr):
    """The first token each query of a block may see, as a column; None when that is 0 for all."""
    if limits.starts is not None:
        return load_rows(limits.starts, tl.cast(batch, tl.int64) * tokens, block, tokens, 0, BLOCK)[:, None]
    else:
        return None


@triton.jit
def row_prefix(limits, batch):
    """How many first positions see each other; None for none."""
    if limits.prefix is not None:
        return tl.load(limits.prefix + batch)
    else:
        return None


@triton.jit
def keys_exist(limits, batch, block, BLOCK: tl.constexpr):
    """Which keys of a block exist, as a row; None when all do."""
    if limits.exists is not None:
        offset = tl.cast(batch, tl.int64) * limits.entries
        return (load_rows(limits.exists, offset, block, limits.entries, 0, BLOCK) != 0)[None, :]
    else:
        return None


@triton.jit
def hide(scores, queries, keys, starts, prefix, exists, entries, KIND: tl.constexpr):
    """-inf where the mask hides the key. Under causality this covers what lies beyond the last token: it comes after
    every real query."""
    if KIND.causal:
        seen = keys <= queries
        sinks = keys < KIND.sinks
        if starts is not None:
            seen = seen & (keys >= starts)
            sinks = keys - starts < KIND.sinks
        if KIND.window > 0:
            near = queries - keys < KIND.window
            if KIND.sinks > 0:
                near = near | sinks
            seen = seen & near
        if prefix is not None:
            seen = seen | ((queries < prefix) & (keys < prefix))
    else:
        seen = (keys < entries) & (queries >= 0)
    if exists is not None:
        seen = seen & exists
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def first_key_block(limits, first_blocks, batch, block, tokens, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The first key block that a query block looks at. Sinks may be anywhere before the window: no skipping then."""
    first = block * 0
    if first_blocks is not None:
        first = tl.load(first_blocks + batch * tl.cdiv(tokens, BLOCK) + block)
    if KIND.window > 0 and KIND.sinks == 0:
        first = tl.maximum(first, tl.maximum(block * BLOCK - KIND.window + 1, 0) // BLOCK)
        if limits.prefix is not None:
            first = tl.where(block * BLOCK < tl.load(limits.prefix + batch), 0, first)
    return first


@triton.jit
def nearest_key_block(limits, batch, block, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """A query block's number minus that of the last key block it looks at, under masks that show keys after the query.

    It is at most 0, but for the last queries where there are fewer keys than queries.
    """
    last = tl.cdiv(limits.entries, BLOCK) - 1
    if KIND.causal:
        prefix = tl.load(limits.prefix + batch)
        last = tl.where(block * BLOCK < prefix, tl.maximum(block, tl.cdiv(prefix, BLOCK) - 1), block)
    return block - last


@triton.jit
def nearest_query_block(limits, batch, block, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The number of the first query block that looks at a key block, minus the key block's own: at most 0, under masks
    that show keys after the query."""
    nearest = -block
    if KIND.causal:
        nearest = tl.where(block * BLOCK < tl.load(limits.prefix + batch), nearest, 0)
    return nearest


@triton.jit
def last_query_block(limits, last_blocks, batch, block, tokens, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The last query block that looks at a key block."""
    last = tl.cdiv(tokens, BLOCK) - 1
    if last_blocks is not None:
        last = tl.load(last_blocks + batch * tl.cdiv(tokens, BLOCK) + block)
    if KIND.window > 0 and KIND.sinks == 0:
        near = tl.minimum(last, (block * BLOCK + BLOCK + KIND.window - 2) // BLOCK)
        if limits.prefix is not None:
            prefix = tl.load(limits.prefix + batch)
            near = tl.where(block * BLOCK < prefix, tl.maximum(near, tl.cdiv(prefix, BLOCK) - 1), near)
        last = near
    return last


@triton.jit
def absorb(scores, value, mixed, peak, total, KIND: tl.constexpr):
    """One step of the softmax over keys as they come (Milakov and Gimelshein 2018, arXiv 1805.02867), base 2.

    Under causality alone the first block holds every query's own key, which it always sees: the peak is finite from
    then on. Where a query may have seen no key yet its peak is -inf, and 0 stands for it.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    anchor = new_peak
    if KIND.partial:
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - anchor[:, None])
    shrink = tl.exp2(peak - anchor)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return mixed, new_peak, total * shrink + tl.sum(weights, axis=1)
