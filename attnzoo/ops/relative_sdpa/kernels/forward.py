"""The parallel form, forward: one program a block of queries, keys from the nearest block to the farthest."""

import triton
import triton.language as tl

from attnzoo.ops.relative_sdpa.kernels.tiles import (
    content_scores,
    distance_logits,
    far_logits,
    first_key_block,
    head_base,
    hide,
    key_columns,
    load_channels,
    load_tile,
    near_blocks,
    on_or_below_diagonal,
    query_rows,
    row_offset,
    row_starts,
    skew,
    store_rows,
    store_tile,
)


@triton.jit
def key_bias_kernel(
    k, content_bias, key_bias, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """key_bias [B, N, T]: u . k of every query head and key."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    k_head = head_base(k, batch, head // GROUP, tokens, HEADS // GROUP, HEAD_DIM)
    key = load_tile(k_head, block, tokens, KV_STEP, HEAD_DIM, BLOCK, WIDTH).to(tl.float32)
    bias = load_channels(content_bias, head, HEAD_DIM, WIDTH)
    product = tl.sum(key * bias[None, :], axis=1)
    store_rows(key_bias, row_offset(batch, head, tokens, HEADS), product, block, tokens, BLOCK)


@triton.jit
def absorb(scores, value, mixed, peak, total):
    """One step of the softmax over keys as they come (Milakov and Gimelshein 2018, arXiv 1805.02867), base 2.

    The first block holds every query's own key, which it always sees: the peak is finite from then on.
    """
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return mixed, new_peak, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def forward_kernel(
    q, k, v, key_bias, table, table_bias, starts, first_blocks, out, log_sums, far, tokens, rows, scale, turn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """out, and per query for the backward pass: log2 of the softmax's sum, and the relative term of far keys.

    `scale` includes log2(e): scores are powers of two. `turn` is BLOCK (see skew). Tiles are loaded where they are
    used, not before: registers are what limits these kernels. Going away from the diagonal, a tile's L_{b-1} is the
    L_b of the tile before: each costs one product with the table.
    """
    block = tl.cdiv(tokens, BLOCK) - 1 - tl.program_id(0)  # long rows first: the last programs to start are short
    head, batch = tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = HEADS * HEAD_DIM
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    k_head = head_base(k, batch, head // GROUP, tokens, HEADS // GROUP, HEAD_DIM)
    v_head = head_base(v, batch, head // GROUP, tokens, HEADS // GROUP, HEAD_DIM)
    query = load_tile(head_base(q, batch, head, tokens, HEADS, HEAD_DIM), block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    offset = row_offset(batch, head, tokens, HEADS)
    begins = row_starts(starts, batch, block, tokens, BLOCK)
    count = block + 1 - first_key_block(first_blocks, batch, block, tokens, BLOCK, WINDOW, SINKS)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    peak = total - float("inf")
    near = 0
    if table is not None:
        near = tl.minimum(count, near_blocks(rows, BLOCK))
        nearer = tl.zeros([BLOCK, BLOCK], tl.float32)
        for distance in range(near):
            turns = distance * turn
            logits = distance_logits(query, table, table_bias, head, distance, rows, HEAD_DIM, BLOCK, WIDTH)
            relative = skew(tl.where(on_or_below_diagonal(turns, BLOCK), logits, nearer), turns, BLOCK)
            key = load_tile(k_head, block - distance, tokens, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
            scores = content_scores(query, key, key_bias, offset, block - distance, tokens, BLOCK)
            keys = key_columns(block - distance, BLOCK)
            scores = hide((scores + relative) * scale, query_rows(block, BLOCK), keys, begins, WINDOW, SINKS)
            value = load_tile(v_head, block - distance, tokens, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
            mixed, peak, total = absorb(scores, value, mixed, peak, total)
            nearer = logits
        last_row = far_logits(query, table, table_bias, head, rows, HEAD_DIM, WIDTH)
        store_rows(far, offset, last_row, block, tokens, BLOCK)
    for distance in range(near, count):
        key = load_tile(k_head, block - distance, tokens, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        scores = content_scores(query, key, key_bias, offset, block - distance, tokens, BLOCK)
        if table is not None:
            scores += last_row[:, None]
        keys = key_columns(block - distance, BLOCK)
        scores = hide(scores * scale, query_rows(block, BLOCK), keys, begins, WINDOW, SINKS)
        value = load_tile(v_head, block - distance, tokens, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        mixed, peak, total = absorb(scores, value, mixed, peak, total)
    out_head = head_base(out, batch, head, tokens, HEADS, HEAD_DIM)
    store_tile(out_head, mixed / total[:, None], block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    store_rows(log_sums, offset, peak + tl.log2(total), block, tokens, BLOCK)
