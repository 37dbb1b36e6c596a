"""W shifted multiply-adds in place, over tiles of rows that stay in the cache.

A grouped convolution wants channels before time: two transposes of every tensor, and 8 times the time on a CPU. Plain
autograd over shifted slices keeps a padded copy of x and one more tensor for every tap; here the backward needs only x
and the kernel. Rows that look across the start of a document are few and are computed separately.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.derived_memory import representative
from attnzoo.ops.common.first_order import first_order
from attnzoo.types import accumulation_dtype

TILE_BYTES = 1 << 20
"""Bytes of x in a tile: three such tiles (x, y and a product) fit the second-level caches of two cores."""

Tile = tuple[slice, int, int]


def depthwise_conv_qkv_torch(
    qkv: tuple[Tensor, Tensor, Tensor],
    kernels: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    tails: tuple[Tensor | None, Tensor | None, Tensor | None],
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        depthwise_conv_torch(x, kernel, bias, tail, starts_BT)
        for x, kernel, bias, tail in zip(qkv, kernels, biases, tails, strict=True)
    )
    return q, k, v


def depthwise_conv_torch(
    x_BTNH: Tensor, kernel_NHW: Tensor, bias_NH: Tensor | None, tail_BWNH: Tensor | None, starts_BT: Tensor | None
) -> Tensor:
    age_BT = None
    if starts_BT is not None:
        age_BT = torch.arange(x_BTNH.shape[1], device=starts_BT.device) - starts_BT
    if torch.compiler.is_compiling():
        return _for_the_compiler(x_BTNH, kernel_NHW, bias_NH, tail_BWNH, age_BT)
    out: Tensor = _DepthwiseConv.apply(x_BTNH, kernel_NHW, bias_NH, tail_BWNH, age_BT)
    return out


def _for_the_compiler(
    x_BTNH: Tensor, kernel_NHW: Tensor, bias_NH: Tensor | None, tail_BWNH: Tensor | None, age_BT: Tensor | None
) -> Tensor:
    """The taps as one expression, which torch.compile fuses; it cannot compile writes into tiles."""
    width, tokens = kernel_NHW.shape[-1], x_BTNH.shape[1]
    before = F.pad(x_BTNH, (0, 0, 0, 0, width - 1, 0)) if tail_BWNH is None else torch.cat([tail_BWNH, x_BTNH], dim=1)
    y = x_BTNH * kernel_NHW[..., width - 1]
    for d in range(1, width):
        tap = before[:, width - 1 - d : width - 1 - d + tokens]
        if age_BT is not None:
            tap = torch.where((age_BT >= d)[:, :, None, None], tap, 0.0)
        y = y + tap * kernel_NHW[..., width - 1 - d]
    return y if bias_NH is None else y + bias_NH


class _DepthwiseConv(torch.autograd.Function):
    """age_BT: the number of rows before each token that belong to its document; None: all."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTNH: Tensor,
        kernel_NHW: Tensor,
        bias_NH: Tensor | None,
        tail_BWNH: Tensor | None,
        age_BT: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_BTNH, kernel_NHW, tail_BWNH, age_BT)
        taps_WNH = kernel_NHW.movedim(-1, 0).flip(0).contiguous()
        width = len(taps_WNH)
        y = torch.empty(x_BTNH.shape, dtype=torch.promote_types(x_BTNH.dtype, kernel_NHW.dtype), device=x_BTNH.device)
        for rows, start, end in _tiles(x_BTNH):
            x_rows, y_tile = x_BTNH[rows], y[rows, start:end]
            torch.mul(x_rows[:, start:end], taps_WNH[0], out=y_tile)
            if bias_NH is not None:
                y_tile += bias_NH
            for d in range(1, min(width, end)):
                first = max(start, d)
                y_tile[:, first - start :].addcmul_(x_rows[:, first - d : end - d], taps_WNH[d])
        if tail_BWNH is not None:
            for d, carried in _carried(tail_BWNH, x_BTNH.shape[1]):
                y[:, : carried.shape[1]].addcmul_(carried, taps_WNH[d])
        if age_BT is not None:
            _cut_rows(y, x_BTNH, taps_WNH, bias_NH, age_BT)
        return y

    @staticmethod
    @first_order("the depthwise convolution")
    def backward(ctx: Any, dy_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        x_BTNH, kernel_NHW, tail_BWNH, age_BT = ctx.saved_tensors
        need_x, need_kernel, need_bias, *_ = ctx.needs_input_grad
        taps_WNH = kernel_NHW.movedim(-1, 0).flip(0).contiguous()
        dx, dtaps_WNH = _through_tiles(dy_BTNH, x_BTNH, taps_WNH, (need_x, need_kernel))
        dtail = None
        if tail_BWNH is not None:
            dtail = add_tail_gradients(dtaps_WNH, dy_BTNH, tail_BWNH, taps_WNH)
        if age_BT is not None:
            _uncount_cut_taps(dtaps_WNH, dy_BTNH, x_BTNH, age_BT)
            if dx is not None:
                _cut_gradient_rows(dx, dy_BTNH, taps_WNH, age_BT)
        dkernel = dtaps_WNH.flip(0).movedim(0, -1).sum_to_size(kernel_NHW.shape).to(kernel_NHW.dtype)
        dbias = None
        if need_bias:
            dbias = dy_BTNH.sum((0, 1)).sum_to_size(kernel_NHW.shape[:-1])
        return dx, dkernel if need_kernel else None, dbias, dtail, None


def _tiles(x_BTNH: Tensor) -> Iterator[Tile]:
    """Cuts of batch and time, each of about TILE_BYTES: (rows, start, end)."""
    batch, tokens, heads, head_dim = x_BTNH.shape
    size = max(1, TILE_BYTES // max(1, heads * head_dim * x_BTNH.itemsize))
    step = max(1, size // max(1, tokens))
    for row in representative(range(0, batch, step)):
        for start in representative(range(0, tokens, size)):
            yield slice(row, row + step), start, min(start + size, tokens)


def _carried(tail_BWNH: Tensor, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """For each distance d, the rows of the tail that the first outputs read at that distance."""
    rows = tail_BWNH.shape[1]
    for d in range(1, rows + 1):
        yield d, tail_BWNH[:, rows - d : rows - d + min(d, tokens)]


def add_tail_gradients(dtaps_WNH: Tensor, dy_BTNH: Tensor, tail_BWNH: Tensor, taps_WNH: Tensor) -> Tensor:
    """Adds the tail's share to `dtaps_WNH` in place and returns the gradient of the tail."""
    dtail = torch.zeros_like(tail_BWNH)
    for d, carried in _carried(tail_BWNH, dy_BTNH.shape[1]):
        dy = dy_BTNH[:, : carried.shape[1]]
        dtaps_WNH[d] += (dy.to(dtaps_WNH.dtype) * carried).sum((0, 1))
        start = len(taps_WNH) - 1 - d
        dtail[:, start : start + dy.shape[1]].addcmul_(dy, taps_WNH[d])
    return dtail


def _through_tiles(
    dy_BTNH: Tensor, x_BTNH: Tensor, taps_WNH: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor]:
    """(dx, dtaps_WNH) as if the row were one document; dtaps is not reduced over shared heads.

    Products for dtaps are added up in one tile per tap, which is summed over its rows once, at the end.
    """
    tokens, width = x_BTNH.shape[1], len(taps_WNH)
    need_x, need_kernel = needed
    dx = torch.empty_like(x_BTNH) if need_x else None
    sums = None
    for rows, start, end in _tiles(x_BTNH):
        x, dy = x_BTNH[rows, start:end], dy_BTNH[rows, start : end + width - 1]
        if sums is None:
            sums = torch.zeros(width, *x.shape, dtype=accumulation_dtype(dy.dtype), device=dy.device)
        for d in range(min(width, tokens - start)):
            later = dy[:, d : d + end - start]
            length = later.shape[1]
            if dx is not None and d == 0:
                torch.mul(later, taps_WNH[0], out=dx[rows, start:end])
            elif dx is not None:
                dx[rows, start : start + length].addcmul_(later, taps_WNH[d])
            if need_kernel:
                sums[d, : len(x), :length].addcmul_(later, x[:, :length])
    if sums is None:
        return dx, taps_WNH.new_zeros(width, *x_BTNH.shape[2:])
    return dx, sums.sum((1, 2))


def _cut_rows(y_BTNH: Tensor, x_BTNH: Tensor, taps_WNH: Tensor, bias_NH: Tensor | None, age_BT: Tensor) -> None:
    """Recomputes the rows near the start of a document, from the taps inside it."""
    batch_R, time_R = (age_BT < len(taps_WNH) - 1).nonzero(as_tuple=True)
    rows = x_BTNH[batch_R, time_R] * taps_WNH[0]
    if bias_NH is not None:
        rows = rows + bias_NH
    for d in range(1, len(taps_WNH)):
        inside = (age_BT[batch_R, time_R] >= d).nonzero()[:, 0]
        rows[inside] += x_BTNH[batch_R[inside], time_R[inside] - d] * taps_WNH[d]
    y_BTNH[batch_R, time_R] = rows


def _uncount_cut_taps(dtaps_WNH: Tensor, dy_BTNH: Tensor, x_BTNH: Tensor, age_BT: Tensor) -> None:
    """Subtracts pairs across a document's start from the sums: they are few, and masking would copy all of dy."""
    for d in range(1, len(dtaps_WNH)):
        batch_R, time_R = (age_BT[:, d:] < d).nonzero(as_tuple=True)
        dtaps_WNH[d] -= (dy_BTNH[batch_R, time_R + d].to(dtaps_WNH.dtype) * x_BTNH[batch_R, time_R]).sum(0)


def _cut_gradient_rows(dx_BTNH: Tensor, dy_BTNH: Tensor, taps_WNH: Tensor, age_BT: Tensor) -> None:
    """Recomputes dx where a later token would have read across the start of its document."""
    width = len(taps_WNH)
    reached_WBT = age_BT.new_zeros(width, *age_BT.shape, dtype=torch.bool)
    cut_BT = reached_WBT[0].clone()
    for d in range(1, width):
        reached_WBT[d, :, :-d] = age_BT[:, d:] >= d
        cut_BT[:, :-d] |= ~reached_WBT[d, :, :-d]
    batch_R, time_R = cut_BT.nonzero(as_tuple=True)
    rows = dy_BTNH[batch_R, time_R] * taps_WNH[0]
    for d in range(1, width):
        inside = reached_WBT[d, batch_R, time_R].nonzero()[:, 0]
        rows[inside] += dy_BTNH[batch_R[inside], time_R[inside] + d] * taps_WNH[d]
    dx_BTNH[batch_R, time_R] = rows.to(dx_BTNH.dtype)
