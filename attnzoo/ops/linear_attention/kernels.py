"""Kernels over chunks: memories in order, everything else with all chunks side by side.

`_memories` walks the chunks of a kv head and stores the memory at each one's start, `_outputs` then reads all chunks
at once; the backward has the same two steps in reverse (`_memory_gradients`, then `_query_`, `_key_` and
`_value_gradients`). This is the chunkwise form of gated linear attention (arXiv 2312.06635, section 4), with a decay
a head. The weights are those of weights.py; powers of the decay are exp2(distance * log2(decay)), distances at least 0.
The normaliser is column `value_dim` of a memory, the sum for a value that is always 1.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Time(NamedTuple):
    """The inputs of the weights: log2 of the decay per kv head, starts [B, T], counts [B] (or None), and tokens."""

    log2_decay: Any
    starts: Any
    counts: Any
    tokens: Any


class ChunkTile(NamedTuple):
    """Compile-time sizes. Memories are [B * K, chunks, head_dim, columns], float32."""

    chunk: int
    key_block: int
    value_block: int
    head_dim: int
    value_dim: int
    columns: int
    kv_heads: int
    group: int
    normalise: bool
    precision: str
    widen: bool


@triton.jit
def _load(rows, b, head, t, column, real, width):
    """[t, column], zero where there is no real token or column."""
    at = rows.x + b * rows.batch + head * rows.head + t.to(tl.int64)[:, None] * rows.row + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _store(rows, b, head, t, column, real, width, value):
    at = rows.x + b * rows.batch + head * rows.head + t.to(tl.int64)[:, None] * rows.row + column[None, :]
    tl.store(at, value.to(rows.x.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])


@triton.jit
def _load_values(rows, ones, b, head, t, column, real, tile: tl.constexpr):
    """Like `_load`, and with a normaliser, column `value_dim` is `ones`, one number per token."""
    x = _load(rows, b, head, t, column, real, tile.value_dim)
    if tile.normalise:
        x = tl.where((column == tile.value_dim)[None, :], ones.to(tl.float32)[:, None].to(x.dtype), x)
    return x


@triton.jit
def _memory_at(base, row, h, column, tile: tl.constexpr):
    """Pointers to [h, column] of memory number `row`, and which of them exist."""
    width: tl.constexpr = tile.value_dim + tile.normalise
    at = base + row.to(tl.int64) * (tile.head_dim * tile.columns) + h[:, None] * tile.columns + column[None, :]
    return at, (h < tile.head_dim)[:, None] & (column < width)[None, :]


@triton.jit
def _end(time, b):
    """How many of a row's tokens are real."""
    end = time.tokens
    if time.counts is not None:
        end = tl.minimum(end, tl.load(time.counts + b).to(tl.int32))
    return end


@triton.jit
def _log2(time, kv):
    log2 = 0.0
    if time.log2_decay is not None:
        log2 = tl.load(time.log2_decay + kv)
    return log2


@triton.jit
def _power(exponent, log2, slope: tl.constexpr):
    """decay^exponent, or its derivative by the decay."""
    exponent = tl.maximum(exponent, 0).to(tl.float32)
    if slope:
        return exponent * tl.exp2(tl.maximum(exponent - 1.0, 0.0) * log2)
    return tl.exp2(exponent * log2)


@triton.jit
def _inside(time, b, first, log2, chunk: tl.constexpr, slope: tl.constexpr):
    """[queries, keys] of a chunk."""
    i = tl.arange(0, chunk)
    seen = i[:, None] >= i[None, :]
    if time.starts is not None:
        start = tl.load(time.starts + b * time.tokens + first + i, mask=first + i < time.tokens, other=0)
        seen = seen & ((first + i)[None, :] >= start[:, None])
    return tl.where(seen, _power(i[:, None] - i[None, :], log2, slope), 0.0)


@triton.jit
def _carry(time, b, first, log2, chunk: tl.constexpr, slope: tl.constexpr):
    """The weight of the memory at the chunk's start for each query."""
    i = tl.arange(0, chunk)
    weight = _power(i + 1, log2, slope)
    if time.starts is not None:
        start = tl.load(time.starts + b * time.tokens + first + i, mask=first + i < time.tokens, other=0)
        weight = tl.where(start < first, weight, 0.0)
    return weight


@triton.jit
def _last_start(time, b, first, chunk: tl.constexpr):
    return tl.load(time.starts + b * time.tokens + tl.minimum(first + chunk, time.tokens) - 1)


@triton.jit
def _age(time, b, first, end, log2, chunk: tl.constexpr, slope: tl.constexpr):
    """The weight with which each key enters the memory at the chunk's end."""
    i = tl.arange(0, chunk)
    length = tl.minimum(tl.maximum(end - first, 0), chunk)
    weight = _power(length - 1 - i, log2, slope)
    if time.starts is not None:
        weight = tl.where(first + i >= _last_start(time, b, first, chunk), weight, 0.0)
    return weight


@triton.jit
def _kept(time, b, first, end, log2, chunk: tl.constexpr, slope: tl.constexpr):
    """The weight of the memory at the chunk's start in the memory at its end."""
    weight = _power(tl.minimum(tl.maximum(end - first, 0), chunk), log2, slope)
    if time.starts is not None:
        weight = tl.where(_last_start(time, b, first, chunk) < first, weight, 0.0)
    return weight


@triton.jit
def _dot(left, right, rows, tile: tl.constexpr):
    """A product summed in float32, of bfloat16 where the tensors are, else of float32: memories may exceed float16."""
    if rows.x.dtype.element_ty == tl.bfloat16:
        left, right = left.to(tl.bfloat16), right.to(tl.bfloat16)
        if not tile.widen:
            return tl.dot(left, right)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision=tile.precision)


@triton.jit
def memories_kernel(k, v, before, memories, after, time, tile: tl.constexpr):
    """memories[chunk]: the memory at the start of each chunk; `before` is the first, or None for zeros."""
    row = tl.program_id(0)
    b, kv = (row // tile.kv_heads).to(tl.int64), row % tile.kv_heads
    column = tl.program_id(1) * tile.value_block + tl.arange(0, tile.value_block)
    h = tl.program_id(2) * tile.key_block + tl.arange(0, tile.key_block)
    chunks = tl.cdiv(time.tokens, tile.chunk)
    end, log2 = _end(time, b), _log2(time, kv)
    memory = tl.zeros((tile.key_block, tile.value_block), tl.float32)
    width: tl.constexpr = tile.value_dim + tile.normalise
    at = row.to(tl.int64) * (tile.head_dim * width) + h[:, None] * width + column[None, :]
    exists = (h < tile.head_dim)[:, None] & (column < width)[None, :]
    if before is not None:
        memory = tl.load(before + at, mask=exists, other=0.0)
    for i in range(chunks):
        to, inside = _memory_at(memories, row * chunks + i, h, column, tile)
        tl.store(to, memory, mask=inside)
        first = i * tile.chunk
        t = first + tl.arange(0, tile.chunk)
        real = t < end
        age = _age(time, b, first, end, log2, tile.chunk, False)
        key = _load(k, b, kv, t, h, real, tile.head_dim) * age[:, None]
        value = _load_values(v, real, b, kv, t, column, real, tile)
        memory = memory * _kept(time, b, first, end, log2, tile.chunk, False) + _dot(tl.trans(key), value, k, tile)
    tl.store(after + at, memory, mask=exists)


@triton.jit
def outputs_kernel(q, k, v, o, totals, memories, time, tile: tl.constexpr):
    """o of one chunk and head; totals [B, N, T] are the normalisers that the backward needs."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    b, n = (row // (tile.kv_heads * tile.group)).to(tl.int64), row % (tile.kv_heads * tile.group)
    kv = n // tile.group
    first = chunk * tile.chunk
    t = first + tl.arange(0, tile.chunk)
    end, log2 = _end(time, b), _log2(time, kv)
    real = t < end
    h = tl.arange(0, tile.key_block)
    column = tl.program_id(2) * tile.value_block + tl.arange(0, tile.value_block)
    memory_row = (b * tile.kv_heads + kv) * tl.num_programs(0) + chunk
    query = _load(q, b, n, t, h, real, tile.head_dim)
    key = _load(k, b, kv, t, h, real, tile.head_dim)
    scores = _dot(query, tl.trans(key), q, tile) * _inside(time, b, first, log2, tile.chunk, False)
    carry = _carry(time, b, first, log2, tile.chunk, False)
    at, exists = _memory_at(memories, memory_row, h, column, tile)
    out = _dot(query, tl.load(at, mask=exists, other=0.0), q, tile) * carry[:, None]
    out += _dot(scores, _load(v, b, kv, t, column, real, tile.value_dim), q, tile)
    if tile.normalise:
        at, exists = _memory_at(memories, memory_row, h, tile.value_dim + tl.arange(0, 1), tile)
        normaliser = tl.sum(tl.load(at, mask=exists, other=0.0), axis=1)
        total = tl.sum(scores, axis=1) + carry * tl.sum(query.to(tl.float32) * normaliser[None, :], axis=1)
        total = tl.where(real, total, 1.0)
        out = out / total[:, None]
        if tl.program_id(2) == 0:
            tl.store(totals + row.to(tl.int64) * time.tokens + t, total, mask=t < time.tokens)
    _store(o, b, n, t, column, t < time.tokens, tile.value_dim, out)


@triton.jit
def _output_gradient(do, scales, dtotals, b, n, t, column, real, time, tile: tl.constexpr):
    """(do / total, its normaliser column): gradients of a chunk's output before the division."""
    x = _load(do, b, n, t, column, real, tile.value_dim)
    dtotal = tl.zeros_like(t).to(tl.float32)
    if tile.normalise:
        at = (b * (tile.kv_heads * tile.group) + n) * time.tokens + t
        x = x.to(tl.float32) / tl.load(scales + at, mask=real, other=1.0)[:, None]
        dtotal = tl.load(dtotals + at, mask=real, other=0.0)
    return x, dtotal


@triton.jit
def memory_gradients_kernel(q, do, scales, dtotals, dafter, dmemories, dbefore, time, tile: tl.constexpr):
    """dmemories[chunk]: the gradient of the memory at the end of each chunk, from the last chunk to the first."""
    row = tl.program_id(0)
    b, kv = (row // tile.kv_heads).to(tl.int64), row % tile.kv_heads
    column = tl.program_id(1) * tile.value_block + tl.arange(0, tile.value_block)
    h = tl.program_id(2) * tile.key_block + tl.arange(0, tile.key_block)
    chunks = tl.cdiv(time.tokens, tile.chunk)
    end, log2 = _end(time, b), _log2(time, kv)
    width: tl.constexpr = tile.value_dim + tile.normalise
    at = row.to(tl.int64) * (tile.head_dim * width) + h[:, None] * width + column[None, :]
    exists = (h < tile.head_dim)[:, None] & (column < width)[None, :]
    dmemory = tl.load(dafter + at, mask=exists, other=0.0)
    for back in range(chunks):
        i = chunks - 1 - back
        to, inside = _memory_at(dmemories, row * chunks + i, h, column, tile)
        tl.store(to, dmemory, mask=inside)
        first = i * tile.chunk
        t = first + tl.arange(0, tile.chunk)
        real = t < end
        carry = _carry(time, b, first, log2, tile.chunk, False)
        dmemory = dmemory * _kept(time, b, first, end, log2, tile.chunk, False)
        for g in range(tile.group):
            n = kv * tile.group + g
            query = _load(q, b, n, t, h, real, tile.head_dim) * carry[:, None]
            dout, dtotal = _output_gradient(do, scales, dtotals, b, n, t, column, real, time, tile)
            if tile.normalise:
                dout = tl.where((column == tile.value_dim)[None, :], dtotal[:, None], dout)
            dmemory += _dot(tl.trans(query), dout, q, tile)
    tl.store(dbefore + at, dmemory, mask=exists)


@triton.jit
def query_gradients_kernel(qkv, do, scales, dtotals, memories, dq, slopes, time, tile: tl.constexpr):
    """dq of one chunk and head, and with `slopes` [programs] its share of the decay's gradient."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    b, n = (row // (tile.kv_heads * tile.group)).to(tl.int64), row % (tile.kv_heads * tile.group)
    kv = n // tile.group
    first = chunk * tile.chunk
    t = first + tl.arange(0, tile.chunk)
    end, log2 = _end(time, b), _log2(time, kv)
    real = t < end
    h = tl.arange(0, tile.key_block)
    memory_row = (b * tile.kv_heads + kv) * tl.num_programs(0) + chunk
    dscores = tl.zeros((tile.chunk, tile.chunk), tl.float32)
    dcarried = tl.zeros((tile.chunk, tile.key_block), tl.float32)
    for block in range(tl.cdiv(tile.value_dim, tile.value_block)):
        column = block * tile.value_block + tl.arange(0, tile.value_block)
        dout, _ = _output_gradient(do, scales, dtotals, b, n, t, column, real, time, tile)
        dscores += _dot(dout, tl.trans(_load(qkv[2], b, kv, t, column, real, tile.value_dim)), do, tile)
        at, exists = _memory_at(memories, memory_row, h, column, tile)
        exists = exists & (column < tile.value_dim)[None, :]
        dcarried += _dot(dout, tl.trans(tl.load(at, mask=exists, other=0.0)), do, tile)
    if tile.normalise:
        _, dtotal = _output_gradient(do, scales, dtotals, b, n, t, tl.arange(0, tile.value_block), real, time, tile)
        at, exists = _memory_at(memories, memory_row, h, tile.value_dim + tl.arange(0, 1), tile)
        dscores += dtotal[:, None]
        dcarried += dtotal[:, None] * tl.sum(tl.load(at, mask=exists, other=0.0), axis=1)[None, :]
    key = _load(qkv[1], b, kv, t, h, real, tile.head_dim)
    if slopes is not None:
        query = _load(qkv[0], b, n, t, h, real, tile.head_dim)
        scores = _dot(query, tl.trans(key), do, tile) * _inside(time, b, first, log2, tile.chunk, True)
        share = tl.sum(query * dcarried, axis=1) * _carry(time, b, first, log2, tile.chunk, True)
        share += tl.sum(scores * dscores, axis=1)
        tl.store(slopes + row.to(tl.int64) * tl.num_programs(0) + chunk, tl.sum(share, axis=0))
    dscores = dscores * _inside(time, b, first, log2, tile.chunk, False)
    dquery = dcarried * _carry(time, b, first, log2, tile.chunk, False)[:, None] + _dot(dscores, key, do, tile)
    _store(dq, b, n, t, h, t < time.tokens, tile.head_dim, dquery)


@triton.jit
def key_gradients_kernel(qkv, do, scales, dtotals, memories, dk, slopes, time, tile: tl.constexpr):
    """dk of one chunk and kv head; `memories` is (memories, dmemories)."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    b, kv = (row // tile.kv_heads).to(tl.int64), row % tile.kv_heads
    first = chunk * tile.chunk
    t = first + tl.arange(0, tile.chunk)
    end, log2 = _end(time, b), _log2(time, kv)
    real = t < end
    h = tl.arange(0, tile.key_block)
    memory_row = row * tl.num_programs(0) + chunk
    daged = tl.zeros((tile.chunk, tile.key_block), tl.float32)
    agreement = 0.0
    for block in range(tl.cdiv(tile.value_dim + tile.normalise, tile.value_block)):
        column = block * tile.value_block + tl.arange(0, tile.value_block)
        at, exists = _memory_at(memories[1], memory_row, h, column, tile)
        dmemory = tl.load(at, mask=exists, other=0.0)
        daged += _dot(_load_values(qkv[2], real, b, kv, t, column, real, tile), tl.trans(dmemory), do, tile)
        if slopes is not None:
            at, exists = _memory_at(memories[0], memory_row, h, column, tile)
            agreement += tl.sum(tl.sum(tl.load(at, mask=exists, other=0.0) * dmemory, axis=1), axis=0)
    if slopes is not None:
        key = _load(qkv[1], b, kv, t, h, real, tile.head_dim)
        share = tl.sum(key * daged, axis=1) * _age(time, b, first, end, log2, tile.chunk, True)
        kept = agreement * _kept(time, b, first, end, log2, tile.chunk, True)
        tl.store(slopes + row.to(tl.int64) * tl.num_programs(0) + chunk, tl.sum(share, axis=0) + kept)
    dkey = daged * _age(time, b, first, end, log2, tile.chunk, False)[:, None]
    inside = _inside(time, b, first, log2, tile.chunk, False)
    for g in range(tile.group):
        n = kv * tile.group + g
        dscores = tl.zeros((tile.chunk, tile.chunk), tl.float32)
        for block in range(tl.cdiv(tile.value_dim, tile.value_block)):
            column = block * tile.value_block + tl.arange(0, tile.value_block)
            dout, _ = _output_gradient(do, scales, dtotals, b, n, t, column, real, time, tile)
            dscores += _dot(dout, tl.trans(_load(qkv[2], b, kv, t, column, real, tile.value_dim)), do, tile)
        if tile.normalise:
            column = tl.arange(0, tile.value_block)
            dscores += _output_gradient(do, scales, dtotals, b, n, t, column, real, time, tile)[1][:, None]
        dkey += _dot(tl.trans(dscores * inside), _load(qkv[0], b, n, t, h, real, tile.head_dim), do, tile)
    _store(dk, b, kv, t, h, t < time.tokens, tile.head_dim, tl.where(real[:, None], dkey, 0.0))


@triton.jit
def value_gradients_kernel(qkv, do, scales, dtotals, dmemories, dv, time, tile: tl.constexpr):
    """dv of one chunk, kv head and block of columns."""
    chunk, row = tl.program_id(0), tl.program_id(1)
    b, kv = (row // tile.kv_heads).to(tl.int64), row % tile.kv_heads
    first = chunk * tile.chunk
    t = first + tl.arange(0, tile.chunk)
    end, log2 = _end(time, b), _log2(time, kv)
    real = t < end
    h = tl.arange(0, tile.key_block)
    column = tl.program_id(2) * tile.value_block + tl.arange(0, tile.value_block)
    key = _load(qkv[1], b, kv, t, h, real, tile.head_dim)
    at, exists = _memory_at(dmemories, row * tl.num_programs(0) + chunk, h, column, tile)
    age = _age(time, b, first, end, log2, tile.chunk, False)
    dvalue = _dot(key, tl.load(at, mask=exists, other=0.0), do, tile) * age[:, None]
    inside = _inside(time, b, first, log2, tile.chunk, False)
    for g in range(tile.group):
        n = kv * tile.group + g
        query = _load(qkv[0], b, n, t, h, real, tile.head_dim)
        dout, _ = _output_gradient(do, scales, dtotals, b, n, t, column, real, time, tile)
        dvalue += _dot(tl.trans(_dot(query, tl.trans(key), do, tile) * inside), dout, do, tile)
    _store(dv, b, kv, t, column, t < time.tokens, tile.value_dim, dvalue)


@triton.jit
def decode_kernel(qkv, before, after, o, time, tile: tl.constexpr):
    """One token: the memory of a kv head takes one outer product and is read by its query heads."""
    row = tl.program_id(0)
    b, kv = (row // tile.kv_heads).to(tl.int64), row % tile.kv_heads
    column = tl.program_id(1) * tile.value_block + tl.arange(0, tile.value_block)
    h = tl.arange(0, tile.key_block)
    one = tl.arange(0, 1)
    real = one < _end(time, b)
    decay = tl.where(_end(time, b) > 0, tl.exp2(_log2(time, kv)), 1.0)
    width: tl.constexpr = tile.value_dim + tile.normalise
    at = row.to(tl.int64) * (tile.head_dim * width) + h[:, None] * width
    exists = (h < tile.head_dim)[:, None]
    key = tl.sum(_load(qkv[1], b, kv, one, h, real, tile.head_dim).to(tl.float32), axis=0)
    value = tl.sum(_load(qkv[2], b, kv, one, column, real, tile.value_dim).to(tl.float32), axis=0)
    values = exists & (column < tile.value_dim)[None, :]
    memory = tl.load(before + at + column[None, :], mask=values, other=0.0) * decay + key[:, None] * value[None, :]
    tl.store(after + at + column[None, :], memory, mask=values)
    normaliser = tl.zeros((tile.key_block, 1), tl.float32)
    if tile.normalise:
        normaliser = tl.load(before + at + tile.value_dim, mask=exists, other=0.0) * decay + key[:, None]
        if tl.program_id(1) == 0:
            tl.store(after + at + tile.value_dim, normaliser, mask=exists)
    for g in range(tile.group):
        n = kv * tile.group + g
        query = tl.sum(_load(qkv[0], b, n, one, h, real, tile.head_dim).to(tl.float32), axis=0)
        out = tl.sum(query[:, None] * memory, axis=0)
        if tile.normalise:
            total = tl.sum(query[:, None] * normaliser, axis=0)
            out = out / tl.where(real, total, 1.0)
        _store(o, b, n, one, column, one < time.tokens, tile.value_dim, out[None, :])
