"""Kernels: column sums of attention in two passes over tiles of scores, first the log of every row's sum.

Scores are logs to the base 2. One program sums each key's column, in the order of queries, without atomics. Queries and
keys have logical positions; below 0 there is none.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnzoo.ops.common.strided import StridedRows


class Scores(NamedTuple):
    """What scores are made of. queries [B, N, T, H], keys [B, K, S, H]; at_queries [B, T] and at_keys with strides,
    their positions; relative [B, N, T, P] or None: logits by distance, the last for all farther ones; the
    logs of merge counts [B, K, S] with strides, or None. Scores are logs to the base 2: `scale` holds that factor, and
    the logs of counts are multiplied by `count_scale`."""

    queries: StridedRows
    keys: StridedRows
    at_queries: Any
    at_keys: Any
    at_batch: Any
    at_head: Any
    relative: Any
    distances: Any
    merge_counts: Any
    count_batch: Any
    count_head: Any
    tokens: Any
    slots: Any
    scale: Any
    count_scale: Any


class ScoreTile(NamedTuple):
    """Compile-time sizes: of blocks of queries and keys, of heads, of the mask."""

    rows: int
    columns: int
    heads: int
    group: int
    head_dim: int
    wide: int
    window: int
    sinks: int
    widen: bool


@triton.jit
def _load(rows, b, head, index, real, tile):
    column = tl.arange(0, tile.wide)
    at = rows.x + b * rows.batch + head * rows.head + index.to(tl.int64)[:, None] * rows.row + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < tile.head_dim)[None, :], other=0.0)


@triton.jit
def _query_places(scores, b, block, tile):
    """(index, position) of a block of queries."""
    row = block * tile.rows + tl.arange(0, tile.rows)
    return row, tl.load(scores.at_queries + b * scores.tokens + row, mask=row < scores.tokens, other=-1)


@triton.jit
def _key_places(scores, b, k, block, tile):
    """(index, position) of a block of keys."""
    slot = block * tile.columns + tl.arange(0, tile.columns)
    at = scores.at_keys + b * scores.at_batch + k * scores.at_head + slot
    return slot, tl.load(at, mask=slot < scores.slots, other=-1)


@triton.jit
def _visible(at_query, at_key, tile):
    seen = (at_key >= 0)[None, :] & (at_key[None, :] <= at_query[:, None])
    if tile.window > 0:
        near = at_query[:, None] - at_key[None, :] < tile.window
        if tile.sinks > 0:
            near = near | (at_key < tile.sinks)[None, :]
        seen = seen & near
    return seen


@triton.jit
def _scores(scores, query, key, row, at_query, slot, at_key, b, head, k, tile):
    """Scores of a tile, -inf where the mask hides the key."""
    if tile.widen:
        query, key = query.to(tl.float32), key.to(tl.float32)
    product = tl.dot(query, tl.trans(key), input_precision="ieee")
    seen = _visible(at_query, at_key, tile)
    if scores.relative is not None:
        distance = tl.minimum(at_query[:, None] - at_key[None, :], scores.distances - 1)
        first = ((b * tile.heads + head) * scores.tokens + row) * scores.distances
        product += tl.load(scores.relative + first[:, None] + distance, mask=seen, other=0.0)
    product = product * scores.scale
    if scores.merge_counts is not None:
        counts_at = scores.merge_counts + b * scores.count_batch + k * scores.count_head + slot
        merge_counts = tl.load(counts_at, mask=at_key >= 0, other=0.0).to(tl.float32) * scores.count_scale
        product += merge_counts[None, :]
    return tl.where(seen, product, float("-inf"))


@triton.jit
def log_sums_kernel(scores, reach, log_sums, tile: tl.constexpr):
    """Grid (blocks of queries, N, B). log_sums [B, N, T], 0 for a query that sees nothing; reach [B, K, blocks]: key
    blocks up to the last one that a block of queries sees."""
    block, head = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    k = head // tile.group
    row, at_query = _query_places(scores, b, block, tile)
    query = _load(scores.queries, b, head, row, row < scores.tokens, tile)
    total = tl.zeros([tile.rows], tl.float32)
    peak = total - float("inf")
    last = tl.load(reach + (b * (tile.heads // tile.group) + k) * tl.num_programs(0) + block)
    for j in range(last):
        slot, at_key = _key_places(scores, b, k, j, tile)
        key = _load(scores.keys, b, k, slot, at_key >= 0, tile)
        tile_scores = _scores(scores, query, key, row, at_query, slot, at_key, b, head, k, tile)
        new_peak = tl.maximum(peak, tl.max(tile_scores, axis=1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(tile_scores - anchor[:, None]), axis=1)
        peak = new_peak
    some = total > 0.0
    result = tl.where(some, peak, 0.0) + tl.log2(tl.where(some, total, 1.0))
    tl.store(log_sums + (b * tile.heads + head) * scores.tokens + row, result, mask=row < scores.tokens)


@triton.jit
def columns_kernel(scores, log_sums, log_sums_batch, log_sums_head, begins, accumulated, tile: tl.constexpr):
    """Grid (blocks of keys, K, B). Adds to accumulated attention [B, K, S]; begins [B, K, blocks]: the first block of
    queries that sees a block of keys."""
    block, k = tl.program_id(0), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    place = b * (tile.heads // tile.group) + k
    slot, at_key = _key_places(scores, b, k, block, tile)
    key = _load(scores.keys, b, k, slot, at_key >= 0, tile)
    first = tl.load(begins + place * tl.num_programs(0) + block)
    summed = tl.zeros([tile.columns], tl.float32)
    for g in range(tile.group):
        head = k * tile.group + g
        for i in range(first, tl.cdiv(scores.tokens, tile.rows)):
            row, at_query = _query_places(scores, b, i, tile)
            query = _load(scores.queries, b, head, row, row < scores.tokens, tile)
            tile_scores = _scores(scores, query, key, row, at_query, slot, at_key, b, head, k, tile)
            sums_at = log_sums + b * log_sums_batch + head * log_sums_head + row
            sums = tl.load(sums_at, mask=row < scores.tokens, other=0.0)
            summed += tl.sum(tl.exp2(tile_scores - sums[:, None]), axis=0)
    inside = slot < scores.slots
    accumulated_at = accumulated + place * scores.slots + slot
    tl.store(accumulated_at, tl.load(accumulated_at, mask=inside, other=0.0) + summed, mask=inside)
