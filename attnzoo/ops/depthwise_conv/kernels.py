"""Kernels: a program is one tile of time of one head; the grid's second axis counts the heads of q, k and v in a row.

Rows are read once for each tap, from the cache after the first, and summed in float32. The gradients of kernels and
biases are summed over the rows of a program here and over programs by the caller.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class ConvRows(NamedTuple):
    """One of q, k and v: rows read and written, its kernel, and the strides between batches, tokens and heads.

    Backward: `x` are the rows of the forward, `other` the gradient of its output, `y` the gradient of x, and `bias`
    the partial sums [programs, all heads, W + 1, H]. Forward: `other` is the tail.
    """

    x: Any
    y: Any
    kernel: Any
    bias: Any
    other: Any
    x_batch: Any
    x_time: Any
    x_head: Any
    other_batch: Any
    other_time: Any
    other_head: Any
    kernel_head: Any
    heads: Any


@triton.jit
def _convolve(rows, head, starts, tokens, width: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr):
    tiles = tl.cdiv(tokens, block[0])
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * block[0]
    i = tl.arange(0, block[0])
    t = first.to(tl.int32) + i
    h = tl.arange(0, block[1])
    inside_TH = (t < tokens)[:, None] & (h < head_dim)[None, :]
    start = tl.zeros_like(t)
    if starts is not None:
        start = tl.load(starts + b * tokens + t, mask=t < tokens, other=0).to(tl.int32)
    total = tl.zeros((block[0], block[1]), tl.float32)
    for d in tl.static_range(width):
        source = t - d
        read = rows.x + b * rows.x_batch + first * rows.x_time + head * rows.x_head
        read += (i - d)[:, None] * rows.x_time + h[None, :]
        x = tl.load(read, mask=inside_TH & (source >= start)[:, None], other=0.0).to(tl.float32)
        if rows.other is not None:
            carried = rows.other + b * rows.other_batch + head * rows.other_head + h[None, :]
            carried += (width - 1 + source)[:, None] * rows.other_time
            x += tl.load(carried, mask=inside_TH & (source < 0)[:, None], other=0.0).to(tl.float32)
        tap = tl.load(rows.kernel + head * rows.kernel_head + h * width + (width - 1 - d), mask=h < head_dim, other=0.0)
        total += x * tap.to(tl.float32)[None, :]
    if rows.bias is not None:
        bias = tl.load(rows.bias + head * (rows.kernel_head // width) + h, mask=h < head_dim, other=0.0)
        total += bias.to(tl.float32)[None, :]
    write = rows.y + (b * tokens + first) * (rows.heads * head_dim) + head * head_dim
    write += i[:, None] * (rows.heads * head_dim) + h[None, :]
    tl.store(write, total.to(rows.y.dtype.element_ty), mask=inside_TH)


@triton.jit
def forward_kernel(q, k, v, starts, tokens, width: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr):
    head = tl.program_id(1)
    if head < q.heads:
        _convolve(q, head, starts, tokens, width, head_dim, block)
    elif head < q.heads + k.heads:
        _convolve(k, head - q.heads, starts, tokens, width, head_dim, block)
    else:
        _convolve(v, head - q.heads - k.heads, starts, tokens, width, head_dim, block)


@triton.jit
def _gradients(rows, head, starts, tokens, width: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr):
    tiles = tl.cdiv(tokens, block[0])
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * block[0]
    i = tl.arange(0, block[0])
    t = first.to(tl.int32) + i
    h = tl.arange(0, block[1])
    inside_TH = (t < tokens)[:, None] & (h < head_dim)[None, :]
    read = rows.x + b * rows.x_batch + first * rows.x_time + head * rows.x_head
    read += i[:, None] * rows.x_time + h[None, :]
    x = tl.load(read, mask=inside_TH, other=0.0).to(tl.float32)
    partial = rows.bias + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (
        (width + 1) * head_dim
    )
    dx = tl.zeros((block[0], block[1]), tl.float32)
    for d in tl.static_range(width):
        later = t + d
        seen = later < tokens
        if starts is not None:
            seen = seen & (t >= tl.load(starts + b * tokens + later, mask=seen, other=0))
        source = rows.other + b * rows.other_batch + first * rows.other_time + head * rows.other_head
        source += (i + d)[:, None] * rows.other_time
        dy = tl.load(source + h[None, :], mask=inside_TH & seen[:, None], other=0.0).to(tl.float32)
        tap = tl.load(rows.kernel + head * rows.kernel_head + h * width + (width - 1 - d), mask=h < head_dim, other=0.0)
        dx += dy * tap.to(tl.float32)[None, :]
        tl.store(partial + (width - 1 - d) * head_dim + h, tl.sum(dy * x, axis=0), mask=h < head_dim)
        if d == 0:
            tl.store(partial + width * head_dim + h, tl.sum(dy, axis=0), mask=h < head_dim)
    write = rows.y + (b * tokens + first) * (rows.heads * head_dim) + head * head_dim
    write += i[:, None] * (rows.heads * head_dim) + h[None, :]
    tl.store(write, dx.to(rows.y.dtype.element_ty), mask=inside_TH)


@triton.jit
def backward_kernel(q, k, v, starts, tokens, width: tl.constexpr, head_dim: tl.constexpr, block: tl.constexpr):
    head = tl.program_id(1)
    if head < q.heads:
        _gradients(q, head, starts, tokens, width, head_dim, block)
    elif head < q.heads + k.heads:
        _gradients(k, head - q.heads, starts, tokens, width, head_dim, block)
    else:
        _gradients(v, head - q.heads - k.heads, starts, tokens, width, head_dim, block)
