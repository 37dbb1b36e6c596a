"""Split attention over two segments: partial results of ranges of slots, their combination, and the accumulated
attention of keys.

A program takes the query heads of one kv head as the rows of its tiles (row l is query l mod T of head l div T), so
that a key is read once. Scores are logs to the base 2. Splitting the context follows Flash-Decoding (Dao et al. 2023):
a partial result is normalised and carries the log of its sum; how slots are divided changes rounding only.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Segment(NamedTuple):
    """Entries of a cache, channels dense. pages [B, I] or None: slot s of sequence b lies at slot s mod page of row
    pages[b, s div page] of keys and values; without it, at slot s of row b."""

    key: Any
    value: Any
    positions: Any
    channels: Any
    log_counts: Any
    pages: Any
    slots: Any
    page: Any
    key_batch: Any
    key_head: Any
    key_slot: Any
    value_batch: Any
    value_head: Any
    value_slot: Any
    position_batch: Any
    position_head: Any
    count_batch: Any
    count_head: Any


class Queries(NamedTuple):
    """q [B, N, T, H] with strides, positions [B, T], bias [B, N, T, S] or None, probe [B, K, C] or None."""

    x: Any
    batch: Any
    head: Any
    time: Any
    positions: Any
    positions_batch: Any
    bias: Any
    bias_batch: Any
    bias_head: Any
    bias_time: Any
    probe: Any
    tokens: Any


class Partial(NamedTuple):
    """Partial results of every split: out [B, K, splits, L, H], log2 of its sum [B, K, splits, L]. scores [B, K, L, S]
    or None, dots [B, K, P] or None. All float32."""

    out: Any
    log_sums: Any
    scores: Any
    dots: Any
    slots: Any


class DecodeTile(NamedTuple):
    """Compile-time sizes; `wide` ones are powers of two that hold the others."""

    rows: int
    block: int
    kv_heads: int
    group: int
    head_dim: int
    key_dim: int
    key_wide: int
    value_dim: int
    value_wide: int
    tail_wide: int
    widen: bool


@triton.jit
def _product(a, b, tile):
    if tile.widen:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_rows(queries, channels, row, b, k, width, tile, PROBED: tl.constexpr, WIDE: tl.constexpr):
    """Query rows of the kv head in the channels of a segment; the row after the last one is the probe."""
    column = tl.arange(0, WIDE)
    inside = column < width
    channel = column
    if channels is not None:
        channel = tl.load(channels + (b * tile.kv_heads + k) * width + column, mask=inside, other=0)
    real = row < tile.group * queries.tokens
    head = k * tile.group + row // queries.tokens
    at = b * queries.batch + head * queries.head + (row % queries.tokens) * queries.time
    x = tl.load(queries.x + at[:, None] + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    if PROBED:
        probe = tl.load(queries.probe + (b * tile.kv_heads + k) * width + column, mask=inside, other=0.0)
        x = tl.where((row == tile.group * queries.tokens)[:, None], probe[None, :], x)
    return x


@triton.jit
def _addresses(segment, b, k, slot, inside):
    """Addresses of the keys and the values of slots."""
    holder, entry = b, slot.to(tl.int64)
    if segment.pages is not None:
        pages = segment.pages + b * tl.cdiv(segment.slots, segment.page)
        holder = tl.load(pages + slot // segment.page, mask=inside, other=0).to(tl.int64)
        entry = entry % segment.page
    keys_at = holder * segment.key_batch + k * segment.key_head + entry * segment.key_slot
    values_at = holder * segment.value_batch + k * segment.value_head + entry * segment.value_slot
    return segment.key + keys_at, segment.value + values_at


@triton.jit
def _added(queries, segment, b, k, head, token, slot, first_slot, real, held):
    """Bias and log merge counts, as logs to the base 2; 0 without either."""
    added = 0.0
    if queries.bias is not None:
        bias_at = b * queries.bias_batch + head * queries.bias_head + token * queries.bias_time + first_slot
        bias = queries.bias + bias_at[:, None] + slot[None, :]
        added += tl.load(bias, mask=real[:, None] & held[None, :], other=0.0).to(tl.float32) * LOG2_E
    if segment.log_counts is not None:
        counts_at = segment.log_counts + b * segment.count_batch + k * segment.count_head
        added += (tl.load(counts_at + slot, mask=held, other=0.0).to(tl.float32) * LOG2_E)[None, :]
    return added


@triton.jit
def _segment(
    queries, segment, partial, b, k, split, splits, index, first_slot, blocks, row_block, scale, tile,
    PROBED: tl.constexpr, KEY_DIM: tl.constexpr, KEY_WIDE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDE: tl.constexpr,
):  # fmt: skip
    """Softmax over blocks [index, index + blocks) of a segment whose slots are first_slot, ... of all."""
    row = row_block * tile.rows + tl.arange(0, tile.rows)
    count = tile.group * queries.tokens
    real = row < count
    query = _load_rows(queries, segment.channels, row, b, k, KEY_DIM, tile, PROBED, KEY_WIDE)
    token = row % queries.tokens
    at = tl.load(queries.positions + b * queries.positions_batch + token, mask=real, other=-1)
    latest = tl.max(at, axis=0)
    head = k * tile.group + row // queries.tokens
    key_column, value_column = tl.arange(0, KEY_WIDE)[None, :], tl.arange(0, VALUE_WIDE)[None, :]
    mixed = tl.zeros([tile.rows, VALUE_WIDE], tl.float32)
    total = tl.zeros([tile.rows], tl.float32)
    peak = total - float("inf")
    for block in range(index, min(index + blocks, tl.cdiv(segment.slots, tile.block))):
        slot = block * tile.block + tl.arange(0, tile.block)
        inside = slot < segment.slots
        position_at = segment.positions + b * segment.position_batch + k * segment.position_head
        positions = tl.load(position_at + slot, mask=inside, other=-1)
        held = (positions >= 0) & (positions <= latest)
        keys_at, values_at = _addresses(segment, b, k, slot, inside)
        # A weight of 0 does not remove a NaN, so empty slots are not read. A probe reads all slots, except with pages,
        # of which some may be missing.
        wanted = inside if PROBED and segment.pages is None else held
        key_mask = wanted[:, None] & (key_column < KEY_DIM)
        key = tl.load(keys_at[:, None] + key_column, mask=key_mask, other=0.0)
        scores = _product(query, tl.trans(key), tile)
        if PROBED:
            dots_at = (b * tile.kv_heads + k) * segment.slots + slot[None, :]
            tl.store(partial.dots + dots_at + 0 * row[:, None], scores, mask=(row == count)[:, None] & inside[None, :])
        scores = scores * scale + _added(queries, segment, b, k, head, token, slot, first_slot, real, held)
        seen = held[None, :] & (positions[None, :] <= at[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        if partial.scores is not None:
            scores_at = ((b * tile.kv_heads + k) * count + row) * partial.slots + first_slot
            scores_at = partial.scores + scores_at[:, None] + slot[None, :]
            tl.store(scores_at, scores, mask=real[:, None] & inside[None, :])
        value_mask = held[:, None] & (value_column < VALUE_DIM)
        value = tl.load(values_at[:, None] + value_column, mask=value_mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a query may have seen no key yet
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(peak - anchor)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + _product(weights.to(value.dtype), value, tile)
        peak = new_peak
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    mixed = mixed / total[:, None]
    out_row = ((b * tile.kv_heads + k) * splits + split) * count + row
    tl.store(partial.log_sums + out_row, tl.where(some, peak + tl.log2(total), float("-inf")), mask=real)
    out_at = partial.out + out_row[:, None] * tile.head_dim + value_column
    tl.store(out_at, mixed, mask=real[:, None] & (value_column < VALUE_DIM))


@triton.jit
def split_kernel(queries, prefix, tail, partial, prefix_splits, blocks, row_blocks, scale, tile: tl.constexpr):
    """Grid (splits * row_blocks, K, B)."""
    split, row_block = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    splits = tl.num_programs(0) // row_blocks
    k, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if split < prefix_splits:
        if prefix is not None:
            _segment(
                queries, prefix, partial, b, k, split, splits, split * blocks, 0, blocks, row_block, scale, tile,
                queries.probe is not None, tile.key_dim, tile.key_wide, tile.value_dim, tile.value_wide,
            )  # fmt: skip
    else:
        first_slot = 0
        if prefix is not None:
            first_slot = prefix.slots
        _segment(
            queries, tail, partial, b, k, split, splits, (split - prefix_splits) * blocks, first_slot, blocks,
            row_block, scale, tile, False, tile.head_dim, tile.tail_wide, tile.head_dim, tile.tail_wide,
        )  # fmt: skip


@triton.jit
def combine_kernel(partial, out, totals, places, prefix_splits, splits, tile: tl.constexpr, SPLITS: tl.constexpr):
    """Grid (L, K, B). out [B, T, N, H]; totals [B, K, L] or None: log2 of the whole sum. places [B, K, H] or None:
    where the prefix stores a value's channel, below 0 for nowhere."""
    row, count = tl.program_id(0), tl.num_programs(0)
    k, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, tile.tail_wide)
    inside = column < tile.head_dim
    first = (b * tile.kv_heads + k) * splits * count + row
    place = column
    if places is not None:
        place = tl.load(places + (b * tile.kv_heads + k) * tile.head_dim + column, mask=inside, other=-1)
    peak = -float("inf")
    total = 0.0
    mixed = tl.zeros([tile.tail_wide], tl.float32)
    for begin in range(0, splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        at = first + split.to(tl.int64) * count
        log_sums = tl.load(partial.log_sums + at, mask=split < splits, other=-float("inf"))
        new_peak = tl.maximum(peak, tl.max(log_sums, axis=0))
        anchor = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(log_sums - anchor)
        shrink = tl.exp2(peak - anchor)
        channel = tl.where((split < prefix_splits)[:, None], place[None, :], column[None, :])
        there = (weights > 0.0)[:, None] & inside[None, :] & (channel >= 0)
        rows = tl.load(partial.out + at[:, None] * tile.head_dim + channel, mask=there, other=0.0)
        mixed = mixed * shrink + tl.sum(rows * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        peak = new_peak
    total = tl.where(total > 0.0, total, 1.0)
    mixed = mixed / total
    tokens = count // tile.group
    head = k * tile.group + row // tokens
    out_at = ((b * tokens + row % tokens) * (tile.kv_heads * tile.group) + head) * tile.head_dim + column
    tl.store(out + out_at, mixed.to(out.dtype.element_ty), mask=inside)
    if totals is not None:
        tl.store(totals + (b * tile.kv_heads + k) * count + row, peak + tl.log2(total))


@triton.jit
def accumulated_kernel(scores, totals, accumulated, count, slots, BLOCK: tl.constexpr):
    """Grid (blocks of slots, K, B). accumulated attention [B, K, S]: weights summed over the rows of a kv head, one
    after the other."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    inside = slot < slots
    summed = tl.zeros([BLOCK], tl.float32)
    for row in range(count):
        total = tl.load(totals + head * count + row)
        score = tl.load(scores + (head * count + row) * slots + slot, mask=inside, other=-float("inf"))
        summed += tl.where(score == -float("inf"), 0.0, tl.exp2(score - total))
    tl.store(accumulated + head * slots + slot, summed, mask=inside)
