"""The parallel form, forward: one program a block of queries, keys from the nearest block to the farthest."""

import triton
import triton.language as tl

from attnzoo.ops.relative_sdpa.kernels.tiles import (
    absorb,
    content_scores,
    distance_logits,
    far_logits,
    first_key_block,
    head_base,
    hide,
    key_columns,
    keys_exist,
    load_channels,
    load_tile,
    near_blocks,
    nearest_key_block,
    on_or_below_diagonal,
    query_rows,
    row_offset,
    row_prefix,
    row_starts,
    skew,
    store_rows,
    store_tile,
)


@triton.jit
def key_bias_kernel(
    k, content_bias, key_bias, entries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """key_bias [B, N, S]: u . k of every query head and key."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    k_head = head_base(k, batch, head // GROUP, entries, HEADS // GROUP, HEAD_DIM)
    key = load_tile(k_head, block, entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH).to(tl.float32)
    bias = load_channels(content_bias, head, HEAD_DIM, WIDTH)
    product = tl.sum(key * bias[None, :], axis=1)
    store_rows(key_bias, row_offset(batch, head, entries, HEADS), product, block, entries, BLOCK)


@triton.jit
def forward_kernel(
    q, k, v, key_bias, table, table_bias, limits, first_blocks, out, log_sums, far, tokens, rows, scale, turn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """out, and per query for the backward pass: log2 of the softmax's sum, and the relative term of far keys.

    `scale` includes log2(e): scores are powers of two. `turn` is BLOCK (see skew). Tiles are loaded where they are
    used, not before: registers are what limits these kernels. Going from the keys last seen to the first, a tile's
    L_{b-1} is the L_b of the tile before: each costs one product with the table.
    """
    block = tl.cdiv(tokens, BLOCK) - 1 - tl.program_id(0)  # long rows first: the last programs to start are short
    head, batch = tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = HEADS * HEAD_DIM
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    k_head = head_base(k, batch, head // GROUP, limits.entries, HEADS // GROUP, HEAD_DIM)
    v_head = head_base(v, batch, head // GROUP, limits.entries, HEADS // GROUP, HEAD_DIM)
    query = load_tile(head_base(q, batch, head, tokens, HEADS, HEAD_DIM), block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    offset = row_offset(batch, head, tokens, HEADS)
    key_offset = row_offset(batch, head, limits.entries, HEADS)
    begins = row_starts(limits, batch, block, tokens, BLOCK)
    prefix = row_prefix(limits, batch)
    count = block + 1 - first_key_block(limits, first_blocks, batch, block, tokens, BLOCK, KIND)
    nearest = 0
    if KIND.ahead:
        nearest = nearest_key_block(limits, batch, block, BLOCK, KIND)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    peak = total - float("inf")
    near = nearest
    if table is not None:
        near = near_blocks(rows, limits.future, nearest, count, BLOCK, KIND)
        mixed, peak, total = absorb_near(
            query, k_head, v_head, key_bias, key_offset, table, table_bias, limits, begins, prefix, batch, head, block,
            nearest, near, mixed, peak, total, rows, scale, turn, KV_STEP, HEAD_DIM, WIDTH, BLOCK, KIND,
        )  # fmt: skip
        last_row = far_logits(query, table, table_bias, head, rows, HEAD_DIM, WIDTH)
        store_rows(far, offset, last_row, block, tokens, BLOCK)
    for distance in range(near, count):
        key = load_tile(k_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        scores = content_scores(query, key, key_bias, key_offset, block - distance, limits.entries, BLOCK)
        if table is not None:
            scores += last_row[:, None]
        keys = key_columns(block - distance, BLOCK)
        exists = keys_exist(limits, batch, block - distance, BLOCK)
        scores = hide(scores * scale, query_rows(block, BLOCK), keys, begins, prefix, exists, limits.entries, KIND)
        value = load_tile(v_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        mixed, peak, total = absorb(scores, value, mixed, peak, total, KIND)
    out_head = head_base(out, batch, head, tokens, HEADS, HEAD_DIM)
    if KIND.partial:  # a query that sees nothing: zeros, and no weights in the backward pass
        peak = tl.where(total > 0.0, peak, float("inf"))
        total = tl.where(total > 0.0, total, 1.0)
    store_tile(out_head, mixed / total[:, None], block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    store_rows(log_sums, offset, peak + tl.log2(total), block, tokens, BLOCK)


@triton.jit
def absorb_near(
    query, k_head, v_head, key_bias, key_offset, table, table_bias, limits, begins, prefix, batch, head, block,
    nearest, near, mixed, peak, total, rows, scale, turn,
    KV_STEP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The softmax over the keys of the tiles that need the table."""
    nearer = tl.zeros([BLOCK, BLOCK], tl.float32)
    if KIND.ahead:
        nearer = distance_logits(
            query, table, table_bias, head, nearest - 1, rows, limits.future, HEAD_DIM, BLOCK, WIDTH
        )
    for distance in range(nearest, near):
        turns = distance * turn
        logits = distance_logits(query, table, table_bias, head, distance, rows, limits.future, HEAD_DIM, BLOCK, WIDTH)
        relative = skew(tl.where(on_or_below_diagonal(turns, BLOCK), logits, nearer), turns, BLOCK)
        key = load_tile(k_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        scores = content_scores(query, key, key_bias, key_offset, block - distance, limits.entries, BLOCK)
        keys = key_columns(block - distance, BLOCK)
        exists = keys_exist(limits, batch, block - distance, BLOCK)
        scores = (scores + relative) * scale
        scores = hide(scores, query_rows(block, BLOCK), keys, begins, prefix, exists, limits.entries, KIND)
        value = load_tile(v_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        mixed, peak, total = absorb(scores, value, mixed, peak, total, KIND)
        nearer = logits
    return mixed, peak, total
