"""Arbitrary positions, forward only: the keys of a cache in any order, with holes, another set for each kv head."""

import triton
import triton.language as tl

from attnzoo.ops.relative_sdpa.kernels.tiles import (
    absorb,
    distance_logits,
    head_base,
    load_channels,
    load_tile,
    row_prefix,
    store_tile,
)


@triton.jit
def logits_kernel(
    q, table, table_bias, logits, tokens, rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [B, N, T, P]: q . R[p] + S[p] in float32; one program a block of the table, for all queries."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    base = head_base(q, batch, head, tokens, HEADS, HEAD_DIM)
    for query_block in range(tl.cdiv(tokens, QUERIES)):
        query = load_tile(base, query_block, tokens, HEADS * HEAD_DIM, HEAD_DIM, QUERIES, WIDTH)
        tile = distance_logits(query, table, table_bias, head, block, rows, None, HEAD_DIM, BLOCK, WIDTH)
        row = query_block * QUERIES + tl.arange(0, QUERIES)[:, None]
        offsets = ((tl.cast(batch, tl.int64) * HEADS + head) * tokens + row) * rows + columns
        tl.store(logits + offsets, tile, mask=(row < tokens) & (columns < rows))


@triton.jit
def visible(query_positions, key_positions, prefix, KIND: tl.constexpr):
    """The mask over logical positions; an empty entry has position -1, and so has what is no query."""
    seen = (key_positions >= 0) & (query_positions >= 0)
    if KIND.causal:
        past = key_positions <= query_positions
        if KIND.window > 0:
            near = query_positions - key_positions < KIND.window
            if KIND.sinks > 0:
                near = near | (key_positions < KIND.sinks)
            past = past & near
        if prefix is not None:
            past = past | ((query_positions < prefix) & (key_positions < prefix))
        seen = seen & past
    return seen


@triton.jit
def load_entries(base, entry, step, held, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `entry` of a cache, zeros where nothing is held: a weight of 0 does not silence a NaN."""
    columns = tl.arange(0, WIDTH)[None, :]
    return tl.load(base + entry[:, None] * step + columns, mask=held[:, None] & (columns < HEAD_DIM), other=0.0)


@triton.jit
def streaming_kernel(
    q, k, v, content_bias, logits, limits, query_positions, key_positions, out, tokens, entries, rows, scale,
    k_batch, k_head, k_step, v_batch, v_head, v_step, query_positions_batch, key_positions_batch, key_positions_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program a block of QUERIES queries, all entries in blocks of BLOCK; a query that sees no key gets zeros.

    Caches are views of larger buffers and are not copied: hence their strides. `logits` holds q . R[p] + S[p] of
    every query and row of the table, [B, N, T, P].
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = HEADS * HEAD_DIM
    kv_head = tl.cast(head // GROUP, tl.int64)
    long_batch = tl.cast(batch, tl.int64)
    query = head_base(q, batch, head, tokens, HEADS, HEAD_DIM)
    query = load_tile(query, block, tokens, STEP, HEAD_DIM, QUERIES, WIDTH)
    if content_bias is not None:
        bias = load_channels(content_bias, head, HEAD_DIM, WIDTH)
        query = (query.to(tl.float32) + bias[None, :]).to(query.dtype)
    row = block * QUERIES + tl.arange(0, QUERIES)
    queries = tl.load(query_positions + long_batch * query_positions_batch + row, mask=row < tokens, other=-1)
    latest = tl.max(queries, axis=0)
    prefix = row_prefix(limits, batch)
    if prefix is not None:
        latest = tl.maximum(latest, prefix - 1)
    key_positions += long_batch * key_positions_batch + kv_head * key_positions_head
    logit_rows = ((long_batch * HEADS + head) * tokens + row[:, None]) * rows
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    peak = total - float("inf")
    for first in range(0, entries, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        keys = tl.load(key_positions + entry, mask=entry < entries, other=-1)
        held = keys >= 0
        if KIND.causal:
            held = held & (keys <= latest)
        long_entry = entry.to(tl.int64)
        key = load_entries(k + long_batch * k_batch + kv_head * k_head, long_entry, k_step, held, HEAD_DIM, WIDTH)
        value = load_entries(v + long_batch * v_batch + kv_head * v_head, long_entry, v_step, held, HEAD_DIM, WIDTH)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        seen = visible(queries[:, None], keys[None, :], prefix, KIND)
        if logits is not None:
            table_row = queries[:, None] - keys[None, :]
            if limits.future is not None:
                table_row = tl.maximum(table_row + limits.future, 0)
            scores += tl.load(logits + logit_rows + tl.minimum(table_row, rows - 1), mask=seen, other=0.0)
        scores = tl.where(seen, scores * scale, float("-inf"))
        mixed, peak, total = absorb(scores, value, mixed, peak, total, KIND)
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    out_head = head_base(out, batch, head, tokens, HEADS, HEAD_DIM)
    store_tile(out_head, mixed, block, tokens, STEP, HEAD_DIM, QUERIES, WIDTH)
