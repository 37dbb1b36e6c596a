"""The parallel form, backward: every sum has one owner and one order.

With p = softmax(a), dp = do . v and delta = sum_j p dp = do . o, the gradient of a score is ds = p (dp - delta); the
scale of the scores is multiplied in at the end. Gradients of a table's block b arrive from two tiles, as do its
logits (see tiles): dL_b[m, c] is the skewed ds of tile b where c <= m, and of tile b + 1 above that diagonal.
"""

import triton
import triton.language as tl

from attnzoo.ops.relative_sdpa.kernels.tiles import (
    content_scores,
    distance_logits,
    first_key_block,
    head_base,
    hide,
    key_columns,
    key_count,
    keys_exist,
    last_query_block,
    load_channels,
    load_rows,
    load_table,
    load_tile,
    near_blocks,
    nearest_key_block,
    nearest_query_block,
    on_or_below_diagonal,
    query_rows,
    row_offset,
    row_prefix,
    row_starts,
    skew,
    store_rows,
    store_tile,
    table_rows,
)


@triton.jit
def delta_kernel(
    out, out_grad, delta, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """delta = do . o per query."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = HEADS * HEAD_DIM
    one = load_tile(head_base(out, batch, head, tokens, HEADS, HEAD_DIM), block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    two = head_base(out_grad, batch, head, tokens, HEADS, HEAD_DIM)
    two = load_tile(two, block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    product = tl.sum(one.to(tl.float32) * two.to(tl.float32), axis=1)
    store_rows(delta, row_offset(batch, head, tokens, HEADS), product, block, tokens, BLOCK)


@triton.jit
def score_gradient(scores, value, mixed_grad, log_sum, delta):
    """(p, ds) of a tile from its scores, as powers of two; a log_sum of inf leaves rows beyond the last token at 0."""
    weights = tl.exp2(scores - log_sum[:, None])
    value_product = tl.dot(mixed_grad, tl.trans(value), input_precision="ieee")
    return weights, weights * (value_product - delta[:, None])


@triton.jit
def query_kernel(
    q, k, v, key_bias, table, table_bias, limits, first_blocks, out_grad, log_sums, far, delta, q_grad, far_grad,
    ahead_grad, tokens, rows, scale, score_scale, turn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """q_grad, far_grad and ahead_grad: the sums of ds over keys at the distance of the table's last row or more, and at
    that of its first row or less where there are rows for keys after the query; they are these rows' gradients.

    Walks as the forward kernel does. A block of the table is finished when the tile after its own is.
    """
    block = tl.cdiv(tokens, BLOCK) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    STEP: tl.constexpr = HEADS * HEAD_DIM
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    k_head = head_base(k, batch, head // GROUP, limits.entries, HEADS // GROUP, HEAD_DIM)
    v_head = head_base(v, batch, head // GROUP, limits.entries, HEADS // GROUP, HEAD_DIM)
    query = load_tile(head_base(q, batch, head, tokens, HEADS, HEAD_DIM), block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    mixed_grad = head_base(out_grad, batch, head, tokens, HEADS, HEAD_DIM)
    mixed_grad = load_tile(mixed_grad, block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    offset, key_offset = row_offset(batch, head, tokens, HEADS), row_offset(batch, head, limits.entries, HEADS)
    log_sum = load_rows(log_sums, offset, block, tokens, float("inf"), BLOCK)
    row_delta = load_rows(delta, offset, block, tokens, 0.0, BLOCK)
    begins = row_starts(limits, batch, block, tokens, BLOCK)
    prefix = row_prefix(limits, batch)
    queries = query_rows(block, BLOCK)
    count = block + 1 - first_key_block(limits, first_blocks, batch, block, tokens, BLOCK, KIND)
    nearest = 0
    if KIND.ahead:
        nearest = nearest_key_block(limits, batch, block, BLOCK, KIND)
    grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    near = nearest
    if table is not None:
        near = near_blocks(rows, limits.future, nearest, count, BLOCK, KIND)
        grad, far_sum, ahead_sum = near_query_gradient(
            query, k_head, v_head, key_bias, key_offset, table, table_bias, limits, begins, prefix, mixed_grad, log_sum,
            row_delta, batch, head, block, nearest, near, rows, score_scale, turn,
            KV_STEP, HEAD_DIM, WIDTH, BLOCK, KIND,
        )  # fmt: skip
        last_row = load_rows(far, offset, block, tokens, 0.0, BLOCK)
    beyond = tl.zeros([BLOCK], tl.float32)
    for distance in range(near, count):
        key = load_tile(k_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        scores = content_scores(query, key, key_bias, key_offset, block - distance, limits.entries, BLOCK)
        if table is not None:
            scores += last_row[:, None]
        keys = key_columns(block - distance, BLOCK)
        exists = keys_exist(limits, batch, block - distance, BLOCK)
        scores = hide(scores * score_scale, queries, keys, begins, prefix, exists, limits.entries, KIND)
        value = load_tile(v_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        _, score_grad = score_gradient(scores, value, mixed_grad, log_sum, row_delta)
        grad += tl.dot(score_grad.to(key.dtype), key, input_precision="ieee")
        beyond += tl.sum(score_grad, axis=1)
    if table is not None:
        grad += beyond[:, None] * load_channels(table, head * rows + rows - 1, HEAD_DIM, WIDTH)[None, :]
        store_rows(far_grad, offset, far_sum + beyond, block, tokens, BLOCK)
        if limits.future is not None:
            store_rows(ahead_grad, offset, ahead_sum, block, tokens, BLOCK)
    q_grad_head = head_base(q_grad, batch, head, tokens, HEADS, HEAD_DIM)
    store_tile(q_grad_head, grad * scale, block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)


@triton.jit
def near_query_gradient(
    query, k_head, v_head, key_bias, key_offset, table, table_bias, limits, begins, prefix, mixed_grad, log_sum,
    row_delta, batch, head, block, nearest, near, rows, score_scale, turn,
    KV_STEP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """(gradient of the query, sums of ds over far keys and over those far ahead) from the tiles that need the table."""
    grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    far_sum = tl.zeros([BLOCK], tl.float32)
    ahead_sum = tl.zeros([BLOCK], tl.float32)
    nearer = tl.zeros([BLOCK, BLOCK], tl.float32)
    future = limits.future
    if KIND.ahead:
        nearer = distance_logits(query, table, table_bias, head, nearest - 1, rows, future, HEAD_DIM, BLOCK, WIDTH)
    unfinished = tl.zeros([BLOCK, BLOCK], query.dtype)
    queries = query_rows(block, BLOCK)
    farthest = rows - 1
    if future is not None:
        farthest -= future
    for distance in range(nearest, near):
        turns = distance * turn
        lower = on_or_below_diagonal(turns, BLOCK)
        keys = key_columns(block - distance, BLOCK)
        logits = distance_logits(query, table, table_bias, head, distance, rows, future, HEAD_DIM, BLOCK, WIDTH)
        relative = skew(tl.where(lower, logits, nearer), turns, BLOCK)
        key = load_tile(k_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        scores = content_scores(query, key, key_bias, key_offset, block - distance, limits.entries, BLOCK)
        scores = (scores + relative) * score_scale
        exists = keys_exist(limits, batch, block - distance, BLOCK)
        scores = hide(scores, queries, keys, begins, prefix, exists, limits.entries, KIND)
        value = load_tile(v_head, block - distance, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
        _, score_grad = score_gradient(scores, value, mixed_grad, log_sum, row_delta)
        far_sum += tl.sum(tl.where(queries - keys >= farthest, score_grad, 0.0), axis=1)
        if future is not None:
            ahead_sum += tl.sum(tl.where(keys - queries >= future, score_grad, 0.0), axis=1)
        grad += tl.dot(score_grad.to(key.dtype), key, input_precision="ieee")
        skewed = skew(score_grad, turns, BLOCK).to(query.dtype)
        rows_before = load_table(table, head, distance - 1, rows, future, HEAD_DIM, BLOCK, WIDTH)
        grad += tl.dot(tl.where(lower, unfinished, skewed), rows_before, input_precision="ieee")
        nearer, unfinished = logits, skewed
    rows_before = load_table(table, head, near - 1, rows, future, HEAD_DIM, BLOCK, WIDTH)
    unfinished = tl.where(on_or_below_diagonal(0, BLOCK), unfinished, tl.zeros([BLOCK, BLOCK], query.dtype))
    return grad + tl.dot(unfinished, rows_before, input_precision="ieee"), far_sum, ahead_sum


@triton.jit
def key_kernel(
    q, k, v, content_bias, key_bias, table, table_bias, limits, last_blocks, out_grad, log_sums, far, delta,
    k_grad, v_grad, content_grad, tokens, rows, scale, score_scale, turn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """k_grad and v_grad, one program a block of keys, and content_grad: the sum of ds over queries, per query head.

    The last is what k_grad takes from u, and all that the gradient of u needs: du = scale * sum_j content_grad_j k_j.
    """
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    k_head = head_base(k, batch, kv_head, limits.entries, HEADS // GROUP, HEAD_DIM)
    v_head = head_base(v, batch, kv_head, limits.entries, HEADS // GROUP, HEAD_DIM)
    key = load_tile(k_head, block, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
    value = load_tile(v_head, block, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
    count = last_query_block(limits, last_blocks, batch, block, tokens, BLOCK, KIND) + 1 - block
    nearest = 0
    if KIND.ahead:
        nearest = nearest_query_block(limits, batch, block, BLOCK, KIND)
    near = nearest
    if table is not None:
        near = near_blocks(rows, limits.future, nearest, count, BLOCK, KIND)
    key_grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    value_grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        sums = tl.zeros([BLOCK], tl.float32)
        if table is not None:
            for distance in range(nearest, near):
                key_grad, value_grad, sums = add_key_gradient(
                    key_grad, value_grad, sums, key, value, q, key_bias, table, table_bias, limits, out_grad,
                    log_sums, far, delta, batch, head, block, distance, tokens, rows, score_scale, distance * turn,
                    HEADS, HEAD_DIM, WIDTH, BLOCK, KIND, True,
                )  # fmt: skip
        for distance in range(near, count):
            key_grad, value_grad, sums = add_key_gradient(
                key_grad, value_grad, sums, key, value, q, key_bias, table, table_bias, limits, out_grad,
                log_sums, far, delta, batch, head, block, distance, tokens, rows, score_scale, distance * turn,
                HEADS, HEAD_DIM, WIDTH, BLOCK, KIND, False,
            )  # fmt: skip
        if content_grad is not None:
            key_grad += sums[:, None] * load_channels(content_bias, head, HEAD_DIM, WIDTH)[None, :]
            key_offset = row_offset(batch, head, limits.entries, HEADS)
            store_rows(content_grad, key_offset, sums, block, limits.entries, BLOCK)
    k_grad_head = head_base(k_grad, batch, kv_head, limits.entries, HEADS // GROUP, HEAD_DIM)
    v_grad_head = head_base(v_grad, batch, kv_head, limits.entries, HEADS // GROUP, HEAD_DIM)
    store_tile(k_grad_head, key_grad * scale, block, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
    store_tile(v_grad_head, value_grad, block, limits.entries, KV_STEP, HEAD_DIM, BLOCK, WIDTH)


@triton.jit
def add_key_gradient(
    key_grad, value_grad, sums, key, value, q, key_bias, table, table_bias, limits, out_grad,
    log_sums, far, delta, batch, head, block, distance, tokens, rows, score_scale, turns,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Adds what the block of queries `distance` blocks after the keys contributes, or before them, below 0.

    The queries change from tile to tile, so no product with the table carries over: two a tile.
    """
    STEP: tl.constexpr = HEADS * HEAD_DIM
    query_block = block + distance
    offset, key_offset = row_offset(batch, head, tokens, HEADS), row_offset(batch, head, limits.entries, HEADS)
    query = head_base(q, batch, head, tokens, HEADS, HEAD_DIM)
    query = load_tile(query, query_block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    if NEAR:
        future = limits.future
        logits = distance_logits(query, table, table_bias, head, distance, rows, future, HEAD_DIM, BLOCK, WIDTH)
        nearer = distance_logits(query, table, table_bias, head, distance - 1, rows, future, HEAD_DIM, BLOCK, WIDTH)
        relative = skew(tl.where(on_or_below_diagonal(turns, BLOCK), logits, nearer), turns, BLOCK)
        scores = content_scores(query, key, key_bias, key_offset, block, limits.entries, BLOCK) + relative
    else:
        scores = content_scores(query, key, key_bias, key_offset, block, limits.entries, BLOCK)
        if table is not None:
            scores += load_rows(far, offset, query_block, tokens, 0.0, BLOCK)[:, None]
    begins = row_starts(limits, batch, query_block, tokens, BLOCK)
    prefix = row_prefix(limits, batch)
    queries, keys = query_rows(query_block, BLOCK), key_columns(block, BLOCK)
    exists = keys_exist(limits, batch, block, BLOCK)
    scores = hide(scores * score_scale, queries, keys, begins, prefix, exists, limits.entries, KIND)
    log_sum = load_rows(log_sums, offset, query_block, tokens, float("inf"), BLOCK)
    row_delta = load_rows(delta, offset, query_block, tokens, 0.0, BLOCK)
    mixed_grad = head_base(out_grad, batch, head, tokens, HEADS, HEAD_DIM)
    mixed_grad = load_tile(mixed_grad, query_block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    weights, score_grad = score_gradient(scores, value, mixed_grad, log_sum, row_delta)
    value_grad += tl.dot(tl.trans(weights.to(value.dtype)), mixed_grad, input_precision="ieee")
    key_grad += tl.dot(tl.trans(score_grad.to(key.dtype)), query, input_precision="ieee")
    return key_grad, value_grad, sums + tl.sum(score_grad, axis=0)


@triton.jit
def table_kernel(
    q, k, v, key_bias, table, table_bias, limits, active_blocks, active_counts, out_grad, log_sums, delta,
    table_grad, bias_grad, batches, tokens, rows, scale, score_scale, turn,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Gradients of the table's rows before the last, and after the first where that is for keys far ahead; one program
    a block of distances.

    Where starts hide whole blocks, the blocks of queries with something to add are listed: a loop with a branch inside
    would not be pipelined.
    """
    distance, head = tl.program_id(0), tl.program_id(1)
    row = distance * BLOCK + tl.arange(0, BLOCK)
    own = row < rows - 1
    if limits.future is not None:
        distance -= tl.cdiv(limits.future - 1, BLOCK)
        row = distance * BLOCK + tl.arange(0, BLOCK) + limits.future
        own = (row > 0) & (row < rows - 1)
    tile = load_table(table, head, distance, rows, limits.future, HEAD_DIM, BLOCK, WIDTH)
    bias = tl.load(table_bias + head * rows + table_rows(distance, rows, limits.future, BLOCK)).to(tl.float32)
    grad = tl.zeros([BLOCK, WIDTH], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(tokens, BLOCK)
    begin, most = distance, tl.maximum(blocks - distance, 0)
    if KIND.ahead:  # a query block meets two key blocks at these distances; at least one of them exists
        begin = tl.maximum(distance, 0)
        most = tl.maximum(tl.minimum(blocks - 1, tl.cdiv(limits.entries, BLOCK) + distance) - begin + 1, 0)
    if KIND.window > 0 and KIND.sinks == 0 and limits.prefix is None:
        most = tl.where(distance * BLOCK < KIND.window, most, 0)
    for batch in range(batches):
        listed = batch * blocks + tl.minimum(distance, blocks - 1)
        count = most
        if active_counts is not None:
            count = tl.minimum(most, tl.load(active_counts + listed))
        for step in range(count):
            block = begin + step
            if active_blocks is not None:
                block = tl.load(active_blocks + listed * blocks + step)
            grad, sums = add_table_gradient(
                grad, sums, tile, bias, q, k, v, key_bias, limits, out_grad, log_sums, delta,
                batch, head, block, distance, tokens, score_scale, block * turn,
                HEADS, GROUP, HEAD_DIM, WIDTH, BLOCK, KIND,
            )  # fmt: skip
    columns = tl.arange(0, WIDTH)[None, :]
    offsets = (head * rows + row)[:, None] * HEAD_DIM + columns
    tl.store(table_grad + offsets, grad * scale, mask=own[:, None] & (columns < HEAD_DIM))
    tl.store(bias_grad + head * rows + row, sums * scale, mask=own)


@triton.jit
def add_table_gradient(
    grad, sums, tile, bias, q, k, v, key_bias, limits, out_grad, log_sums, delta,
    batch, head, block, distance, tokens, score_scale, turns,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Adds what one block of queries contributes to a block of distances.

    Its keys lie in two tiles, on and below the diagonal of one and above that of the next. Which of the two a column
    means depends on the row, so the two tiles' products are merged first; all else is done once.
    """
    STEP: tl.constexpr = HEADS * HEAD_DIM
    KV_STEP: tl.constexpr = HEADS // GROUP * HEAD_DIM
    query = head_base(q, batch, head, tokens, HEADS, HEAD_DIM)
    query = load_tile(query, block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    entries = key_count(limits, tokens, KIND)
    k_head = head_base(k, batch, head // GROUP, entries, HEADS // GROUP, HEAD_DIM)
    v_head = head_base(v, batch, head // GROUP, entries, HEADS // GROUP, HEAD_DIM)
    key_block = block - distance
    before = tl.maximum(key_block - 1, 0)  # where there is no tile before, the columns are hidden below
    lower = on_or_below_diagonal(turns, BLOCK)
    offset, key_offset = row_offset(batch, head, tokens, HEADS), row_offset(batch, head, entries, HEADS)
    scores = merged_products(query, k_head, key_block, before, entries, lower, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
    if key_bias is not None:
        near_bias = load_rows(key_bias, key_offset, key_block, entries, 0.0, BLOCK)[None, :]
        scores += tl.where(lower, near_bias, load_rows(key_bias, key_offset, before, entries, 0.0, BLOCK)[None, :])
    logits = tl.dot(query, tl.trans(tile), input_precision="ieee") + bias[None, :]
    queries = query_rows(block, BLOCK)
    keys = key_columns(key_block, BLOCK) - tl.where(lower, 0, BLOCK)
    begins = row_starts(limits, batch, block, tokens, BLOCK)
    prefix = row_prefix(limits, batch)
    exists = keys_exist(limits, batch, key_block, BLOCK)
    if exists is not None:
        exists = tl.where(lower, exists, keys_exist(limits, batch, before, BLOCK))
    scores = (scores + skew(logits, turns, BLOCK)) * score_scale
    scores = hide(scores, queries, keys, begins, prefix, exists, entries, KIND)
    scores = tl.where(keys >= 0, scores, float("-inf"))
    log_sum = load_rows(log_sums, offset, block, tokens, float("inf"), BLOCK)
    weights = tl.exp2(scores - log_sum[:, None])
    mixed_grad = head_base(out_grad, batch, head, tokens, HEADS, HEAD_DIM)
    mixed_grad = load_tile(mixed_grad, block, tokens, STEP, HEAD_DIM, BLOCK, WIDTH)
    product = merged_products(mixed_grad, v_head, key_block, before, entries, lower, KV_STEP, HEAD_DIM, BLOCK, WIDTH)
    row_delta = load_rows(delta, offset, block, tokens, 0.0, BLOCK)
    logit_grad = skew(weights * (product - row_delta[:, None]), turns, BLOCK)
    grad += tl.dot(tl.trans(logit_grad.to(query.dtype)), query, input_precision="ieee")
    return grad, sums + tl.sum(logit_grad, axis=0)


@triton.jit
def merged_products(
    rows, head, block, before, entries, lower,
    STEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Products of `rows` with block `block` of a head on and below the diagonal, with block `before` above it."""
    columns = load_tile(head, block, entries, STEP, HEAD_DIM, BLOCK, WIDTH)
    products = tl.dot(rows, tl.trans(columns), input_precision="ieee")
    columns = load_tile(head, before, entries, STEP, HEAD_DIM, BLOCK, WIDTH)
    return tl.where(lower, products, tl.dot(rows, tl.trans(columns), input_precision="ieee"))
