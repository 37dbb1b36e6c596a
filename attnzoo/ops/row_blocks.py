"""Causal attention a block of query rows at a time, with or without tables of relative position.

Memory is linear in T, forward and backward: a block of `BLOCK` rows holds its scores against all visible keys, takes
the softmax of whole rows, and is forgotten; the backward pass computes it again from q, k and v.

The relative shift costs nothing. With the table reversed, column c of `q R^T` belongs to distance W-1-c for W keys,
and row r needs it at column c + r - (rows-1): one column further left than row r+1. In a buffer whose rows are W+1
wide that is the same memory read with rows of width W from offset rows-1 on, so the product of queries and table is
written in the one shape, and the product of queries and keys added in the other (Transformer-XL shifts a padded copy
instead, arXiv 1901.02860, appendix B). What lands right of the diagonal is of other rows, and is masked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.masks import CausalMask
from attnzoo.types import accumulation_dtype

BLOCK = 128
"""Rows of a block (64 and 512 were slower on CPU); memory is BLOCK * T elements, in the backward twice."""

_softmax = torch.ops.aten._softmax
_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Tables:
    """u_NH added to the queries where they meet keys; table_NPH and table_bias_NP by distance, the last row for all
    farther ones."""

    content_bias_NH: Tensor
    table_NPH: Tensor
    table_bias_NP: Tensor


def row_block_attention(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, tables: Tables | None, mask: CausalMask, scale: float
) -> Tensor:
    """o_BNTH of the parallel form, for every mask of that form; with tables, the scores of `relative_sdpa`."""
    assert mask.parallel
    relative = [] if tables is None else [tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP]
    out: Tensor = _row_blocks(q_BNTH, k_BKTH, v_BKTH, relative, mask.starts_BT, mask.window, mask.sinks, scale)
    return out


@dataclass(frozen=True)
class _Rows:
    """A block of query rows [first, end) and the keys it meets: [low, end), and the sinks before low, if any."""

    first: int
    end: int
    low: int
    sinks: tuple[int, int] | None

    @property
    def spans(self) -> list[tuple[int, int]]:
        near = (self.low, self.end)
        return [near] if self.sinks is None else [self.sinks, near]


def _blocks(tokens: int, mask: CausalMask, row: int) -> Iterator[_Rows]:
    """The blocks of one sequence; keys that no row of a block sees are left out."""
    for first in range(0, tokens, BLOCK):
        end = min(first + BLOCK, tokens)
        earliest = latest = 0
        if mask.starts_BT is not None:
            starts = mask.starts_BT[row, first:end]
            earliest, latest = int(starts.min()), int(starts.max())
        low = earliest if mask.window is None else max(earliest, first - mask.window + 1)
        sinks = (earliest, min(latest + mask.sinks, low))
        yield _Rows(first, end, low, sinks if mask.sinks and sinks[1] > sinks[0] else None)


def _hide(scores_RW: Tensor, rows: _Rows, span: tuple[int, int], mask: CausalMask, row: int) -> None:
    """Sets the scores of hidden keys to -inf, in place."""
    low, high = span
    if high > rows.first:
        corner = scores_RW[:, rows.first - low :]
        corner.masked_fill_(torch.ones_like(corner, dtype=torch.bool).triu(1), -math.inf)
    if mask.window is None and mask.starts_BT is None:
        return
    index_R1 = torch.arange(rows.first, rows.end, device=scores_RW.device)[:, None]
    key_W = torch.arange(low, high, device=scores_RW.device)
    start_R1 = 0 if mask.starts_BT is None else mask.starts_BT[row, rows.first : rows.end, None]
    hidden = key_W < start_R1
    if mask.window is not None:
        hidden = hidden | ((index_R1 - key_W >= mask.window) & (key_W - start_R1 >= mask.sinks))
    scores_RW.masked_fill_(hidden, -math.inf)


@dataclass(frozen=True)
class _Head:
    """One query head of one sequence in the accumulation dtype; queries scaled. `far_LH`, `far_bias_L`: the table from
    the farthest distance T-1 down to 0 and one row of padding."""

    q_TH: Tensor
    biased_q_TH: Tensor
    k_TH: Tensor
    v_TH: Tensor
    far_LH: Tensor | None
    far_bias_L: Tensor | None

    def distances(self, rows: _Rows, span: tuple[int, int]) -> slice:
        """Where `far_LH` holds the distances between rows and a span, the farthest (rows.end-1 to low) first."""
        first = len(self.q_TH) - (rows.end - span[0])
        return slice(first, first + _product_width(rows, span))

    def scores(self, rows: _Rows, span: tuple[int, int]) -> Tensor:
        """scores_RW of the rows against the keys of a span, nothing hidden yet."""
        low, high = span
        biased, keys = self.biased_q_TH[rows.first : rows.end], self.k_TH[low:high]
        if self.far_LH is None or self.far_bias_L is None:
            return biased @ keys.T
        where = self.distances(rows, span)
        product, shifted = _skewed(self.q_TH, rows, span)
        torch.addmm(self.far_bias_L[where], self.q_TH[rows.first : rows.end], self.far_LH[where].T, out=product)
        return shifted.addmm_(biased, keys.T)

    def weights(self, rows: _Rows, mask: CausalMask, row: int) -> Tensor:
        """Softmax over all spans, side by side: [R, sum of widths]."""
        tiles = []
        for span in rows.spans:
            tile = self.scores(rows, span)
            _hide(tile, rows, span, mask, row)
            tiles.append(tile)
        scores = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)
        out: Tensor = _softmax.out(scores, -1, False, out=scores)
        return out


def _product_width(rows: _Rows, span: tuple[int, int]) -> int:
    """Distances between the rows and a span; those of keys after the query may be wrong and are left out."""
    width, count = span[1] - span[0], rows.end - rows.first
    return width + 1 if span[1] == rows.end else width + count - 1


def _skewed(like: Tensor, rows: _Rows, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(a buffer for queries times table, the same memory as rows against keys): the shift of the module's head."""
    count, columns = rows.end - rows.first, _product_width(rows, span)
    product = like.new_empty(count, columns)
    return product, product.as_strided((count, span[1] - span[0]), (columns - 1, 1), count - 1)


def _heads(inputs: list[Tensor], scale: float) -> Iterator[tuple[int, int, int, _Head]]:
    """(sequence b, query head n, kv head, its tensors), all sequences of a head one after the other."""
    (q, k, v), tables = inputs[:3], inputs[3:]
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    for n in range(q.shape[1]):
        far = far_bias = None
        if tables:
            _, table, table_bias = tables
            order_T = _table_rows(q.shape[2], table.shape[1], q.device)
            far = torch.cat([table[n, order_T], table[n, :1]]).to(dtype)
            far_bias = torch.cat([table_bias[n, order_T], table_bias[n, :1]]).to(dtype) * scale
        for b in range(q.shape[0]):
            head_q = q[b, n].to(dtype) * scale
            biased = torch.add(head_q, tables[0][n].to(dtype), alpha=scale) if tables else head_q
            kv = n // group
            yield b, n, kv, _Head(head_q, biased, k[b, kv].to(dtype), v[b, kv].to(dtype), far, far_bias)


def _table_rows(tokens: int, rows: int, device: torch.device) -> Tensor:
    """The table's row of each distance, from T-1 down to 0."""
    return torch.arange(tokens - 1, -1, -1, device=device).clamp(max=rows - 1)


# One operator to torch.compile, which would otherwise unroll the loop over blocks.
@torch.library.custom_op("attnzoo::row_blocks", mutates_args=())
def _row_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    starts: Tensor | None,
    window: int | None,
    sinks: int,
    scale: float,
) -> Tensor:
    """`tables`: u_NH, table_NPH and table_bias_NP, or nothing for plain attention."""
    mask = CausalMask(window=window, sinks=sinks, starts_BT=starts)
    o_BNTH = q.new_empty(*q.shape[:3], v.shape[-1])
    for b, n, _, head in _heads([q, k, v, *tables], scale):
        for rows in _blocks(q.shape[2], mask, b):
            near = head.v_TH[rows.low : rows.end]
            values = near if rows.sinks is None else torch.cat([head.v_TH[slice(*rows.sinks)], near])
            o_BNTH[b, n, rows.first : rows.end] = head.weights(rows, mask, b) @ values
    return o_BNTH


@torch.library.custom_op("attnzoo::row_blocks_backward", mutates_args=())
def _row_blocks_backward(
    grad: Tensor,
    inputs: list[Tensor],
    starts: Tensor | None,
    window: int | None,
    sinks: int,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v and the tables."""
    mask, sums = CausalMask(window=window, sinks=sinks, starts_BT=starts), _Gradients(inputs)
    for b, n, kv, head in _heads(inputs, scale):
        sums.begin()
        for rows in _blocks(inputs[0].shape[2], mask, b):
            sums.add(head, rows, head.weights(rows, mask, b), grad[b, n, rows.first : rows.end])
        sums.end(b, n, kv, scale)
    return sums.finished()


@_row_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_row_blocks_backward.register_fake
def _(grad: Tensor, inputs: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, tables, starts, *rest = inputs
    ctx.save_for_backward(q, k, v, *tables, starts)
    ctx.rest = rest


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *inputs, starts = ctx.saved_tensors
    q, k, v, *tables = _row_blocks_backward(grad, inputs, starts, *ctx.rest)
    return q, k, v, tables, None, None, None, None


_row_blocks.register_autograd(_differentiate, setup_context=_save)


class _Gradients:
    """Sums of gradients. Keys, values and table are summed transposed, where products of matrices are faster."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs, q, v = inputs, inputs[0], inputs[2]
        dtype, tokens, head_dim = accumulation_dtype(q.dtype), q.shape[2], q.shape[3]
        self.totals = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in inputs]
        self.q_TH, self.biased_q_TH = (q.new_zeros(tokens, head_dim, dtype=dtype) for _ in range(2))
        self.k_HT = q.new_zeros(head_dim, tokens, dtype=dtype)
        self.v_HT = q.new_zeros(v.shape[-1], tokens, dtype=dtype)
        distances = tokens + 1 if len(inputs) > 3 else 0
        self.far_HL = q.new_zeros(head_dim, distances, dtype=dtype)
        self.far_bias_L = q.new_zeros(distances, dtype=dtype)

    def begin(self) -> None:
        """Before a head of a sequence: its own sums are zero."""
        for total in (self.q_TH, self.biased_q_TH, self.k_HT, self.v_HT, self.far_HL, self.far_bias_L):
            total.zero_()

    def add(self, head: _Head, rows: _Rows, weights_RW: Tensor, grad_RH: Tensor) -> None:
        """A block's part, from its weights and the gradient of its outputs."""
        block, grad_RH = slice(rows.first, rows.end), grad_RH.to(weights_RW.dtype)
        widths = [high - low for low, high in rows.spans]
        products = [] if head.far_LH is None else [_skewed(weights_RW, rows, span) for span in rows.spans]
        # A single span is written where the shift's way back reads it.
        grads = products[0][1] if len(products) == 1 else torch.empty_like(weights_RW)
        for part, weights, (low, high) in zip(
            grads.split(widths, dim=1), weights_RW.split(widths, dim=1), rows.spans, strict=True
        ):
            torch.mm(grad_RH, head.v_TH[low:high].T, out=part)
            self.v_HT[:, low:high].addmm_(grad_RH.T, weights)
        _softmax_backward.out(grads, weights_RW, -1, weights_RW.dtype, grad_input=grads)
        for part, (low, high) in zip(grads.split(widths, dim=1), rows.spans, strict=True):
            self.biased_q_TH[block].addmm_(part, head.k_TH[low:high])
            self.k_HT[:, low:high].addmm_(head.biased_q_TH[block].T, part)
        for place, part, span in zip(products, grads.split(widths, dim=1), rows.spans, strict=False):
            self._add_relative(head, rows, span, place, part)

    def _add_relative(
        self, head: _Head, rows: _Rows, span: tuple[int, int], place: tuple[Tensor, Tensor], scores_RW: Tensor
    ) -> None:
        """The way back of the shift: what no key and row wrote is zero."""
        assert head.far_LH is not None
        product, shifted = place
        if shifted.data_ptr() == scores_RW.data_ptr():
            flat, count = product.view(-1), len(product)
            flat[: count - 1], flat[count - 1 + scores_RW.numel() :] = 0.0, 0.0
        else:
            product.zero_()
            shifted.copy_(scores_RW)
        block, where = slice(rows.first, rows.end), head.distances(rows, span)
        self.q_TH[block].addmm_(product, head.far_LH[where])
        self.far_HL[:, where].addmm_(head.q_TH[block].T, product)
        self.far_bias_L[where] += product.sum(0)

    def end(self, b: int, n: int, kv: int, scale: float) -> None:
        """After a head of a sequence: its sums go where they belong. Queries were scaled, keys met scaled queries."""
        (q, k, v), tables = self.totals[:3], self.totals[3:]
        torch.add(self.q_TH, self.biased_q_TH, out=q[b, n]).mul_(scale)
        k[b, kv] += self.k_HT.T
        v[b, kv] += self.v_HT.T
        if tables:
            bias, table, table_bias = tables
            bias[n].add_(self.biased_q_TH.sum(0), alpha=scale)
            order_T = _table_rows(q.shape[2], table.shape[1], q.device)
            _add_rows(table[n], order_T, self.far_HL[:, :-1].T)
            _add_rows(table_bias[n], order_T, self.far_bias_L[:-1] * scale)

    def finished(self) -> list[Tensor]:
        """Gradients in the order and dtype of the inputs."""
        return [total.to(x.dtype) for x, total in zip(self.inputs, self.totals, strict=True)]


def _add_rows(target: Tensor, order_T: Tensor, rows: Tensor) -> None:
    """target[order[t]] += rows[t], in a fixed order of sums: only the last row of the table comes more than once."""
    last = len(target) - 1
    shared = max(len(order_T) - last, 0)  # distances from the last row's on; they come first
    target[last] += rows[:shared].sum(0)
    near = min(last, len(order_T))
    target[:near] += rows[shared:].flip(0)
