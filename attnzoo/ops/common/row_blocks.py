"""Causal attention a block of query rows at a time, with or without tables of relative position.

Memory is linear in T, forward and backward: a block of `BLOCK` rows holds its scores against all visible keys, takes
the softmax of whole rows, and is forgotten; the backward pass computes it again from q, k and v.

The relative shift costs nothing. With the table reversed, column c of `q R^T` belongs to distance W-1-c for W keys,
and row r needs it at column c + r - (rows-1): one column further left than row r+1. In a buffer whose rows are W+1
wide that is the same memory read with rows of width W from offset rows-1 on, so the product of queries and table is
written in the one shape and added to that of queries and keys in the other (Transformer-XL shifts a padded copy
instead, arXiv 1901.02860, appendix B). What lands right of the diagonal is of other rows, and is masked.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.derived_memory import representative
from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.common.negligible import may_be_peaked, product_bound, softmax_of_peaked_
from attnzoo.types import accumulation_dtype

BLOCK = 128
"""Rows of a block: fewer make products that are slow, more make memory."""
TILE_BYTES = 2 << 20
"""Scores of a block in one product: as many heads, then sequences, as fit. Few large operators need few meetings of
threads, small ones stay in the cache."""

_softmax = torch.ops.aten._softmax
_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Tables:
    """u_NH added to the queries where they meet keys; table_NPH and table_bias_NP by distance, the last row for all
    farther ones. A table of no channels, [N, P, 0], meets no queries: distance adds its bias and nothing else."""

    content_bias_NH: Tensor
    table_NPH: Tensor
    table_bias_NP: Tensor

    @classmethod
    def of_bias(cls, bias_NP: Tensor, head_dim: int, scale: float) -> "Tables":
        """A bias that is added after the scale, and nothing else."""
        # Distances of thousands need more digits than half precision has.
        exact = bias_NP.to(accumulation_dtype(bias_NP.dtype))
        heads, rows = exact.shape
        return cls(exact.new_zeros(heads, head_dim), exact.new_zeros(heads, rows, 0), exact / scale)

    def whole(self, head_dim: int) -> "Tables":
        """With zeros for channels that the table lacks, for kernels that multiply by all of them."""
        missing = head_dim - self.table_NPH.shape[2]
        return replace(self, table_NPH=F.pad(self.table_NPH, (0, missing))) if missing else self


def row_block_attention(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, tables: Tables | None, mask: CausalMask, scale: float
) -> Tensor:
    """o_BNTH of the parallel form, for every mask of that form; with tables, the scores of `relative_sdpa`."""
    assert mask.parallel
    relative = [] if tables is None else [tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP]
    # The first call of a custom operator imports the compiler (seconds), and a server's first prompt would wait for it.
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run = _forward if plain else _row_blocks
    out: Tensor = run(q_BNTH, k_BKTH, v_BKTH, relative, mask.starts_BT, mask.window, mask.sinks, scale)
    return out


@dataclass(frozen=True)
class _Rows:
    """A block of query rows [first, end) and the keys it meets: [low, end), and the sinks before low, if any."""

    first: int
    end: int
    low: int
    sinks: tuple[int, int] | None

    @property
    def block(self) -> slice:
        return slice(self.first, self.end)

    @property
    def spans(self) -> list[tuple[int, int]]:
        near = (self.low, self.end)
        return [near] if self.sinks is None else [self.sinks, near]


def _blocks(tokens: int, mask: CausalMask, row: int) -> Iterator[_Rows]:
    """The blocks of one sequence; keys that no row of a block sees are left out."""
    for first in representative(range(0, tokens, BLOCK), largest="last"):
        end = min(first + BLOCK, tokens)
        earliest = latest = 0
        if mask.starts_BT is not None:
            starts = mask.starts_BT[row, first:end]
            earliest, latest = int(starts.min()), int(starts.max())
        low = earliest if mask.window is None else max(earliest, first - mask.window + 1)
        sinks = (earliest, min(latest + mask.sinks, low))
        yield _Rows(first, end, low, sinks if mask.sinks and sinks[1] > sinks[0] else None)


def _hide(scores_PRW: Tensor, rows: _Rows, span: tuple[int, int], mask: CausalMask, row: int) -> None:
    """Sets the scores of hidden keys to -inf, in place."""
    low, high = span
    if high > rows.first:
        corner = scores_PRW[:, :, rows.first - low :]
        corner.masked_fill_(torch.ones_like(corner[0], dtype=torch.bool).triu(1), -math.inf)
    if mask.window is None and mask.starts_BT is None:
        return
    index_R1 = torch.arange(rows.first, rows.end, device=scores_PRW.device)[:, None]
    key_W = torch.arange(low, high, device=scores_PRW.device)
    start_R1 = 0 if mask.starts_BT is None else mask.starts_BT[row, rows.first : rows.end, None]
    hidden = key_W < start_R1
    if mask.window is not None:
        hidden = hidden | ((index_R1 - key_W >= mask.window) & (key_W - start_R1 >= mask.sinks))
    scores_PRW.masked_fill_(hidden, -math.inf)


@dataclass(frozen=True)
class _Group:
    """P pairs of a sequence and a query head that are computed together, in the accumulation dtype; queries scaled.

    `far_PLH`, `far_bias_PL`: the tables from the farthest distance T-1 down to 0 and one row of padding. `peaked`: some
    weights may be negligible (`attnzoo.ops.common.negligible`).
    """

    sequences: slice
    heads: slice
    kv_heads: list[int]
    q_PTH: Tensor
    biased_q_PTH: Tensor
    k_PTH: Tensor
    v_PTH: Tensor
    far_PLH: Tensor | None
    far_bias_PL: Tensor | None
    peaked: bool

    def distances(self, rows: _Rows, span: tuple[int, int]) -> slice:
        """Where `far_PLH` holds the distances between rows and a span, the farthest (rows.end-1 to low) first."""
        first = self.q_PTH.shape[1] - (rows.end - span[0])
        return slice(first, first + _product_width(rows, span))

    def weights(self, rows: _Rows, mask: CausalMask) -> Tensor:
        """Softmax over all spans, side by side: [P, R, sum of widths]."""
        tiles = []
        for span in rows.spans:
            tile = self._scores(rows, span)
            _hide(tile, rows, span, mask, self.sequences.start)
            tiles.append(tile)
        scores = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)
        if self.peaked:
            return softmax_of_peaked_(scores)
        out: Tensor = _softmax.out(scores, -1, False, out=scores)
        return out

    def _scores(self, rows: _Rows, span: tuple[int, int]) -> Tensor:
        """scores_PRW of the rows against the keys of a span, nothing hidden yet."""
        scores = torch.bmm(self.biased_q_PTH[:, rows.block], self.k_PTH[:, slice(*span)].mT)
        if self.far_PLH is not None and self.far_bias_PL is not None:
            where = self.distances(rows, span)
            bias_P1L, far_PLH = self.far_bias_PL[:, None, where], self.far_PLH[:, where]
            scores += _shifted(torch.baddbmm(bias_P1L, self.asking(rows), far_PLH.mT), rows, span)
        return scores

    def asking(self, rows: _Rows) -> Tensor:
        """What of a block's queries meets the table: all channels, or none."""
        assert self.far_PLH is not None
        return self.q_PTH[:, rows.block, : self.far_PLH.shape[2]]


def _product_width(rows: _Rows, span: tuple[int, int]) -> int:
    """Distances between the rows and a span; those of keys after the query may be wrong and are left out."""
    width, count = span[1] - span[0], rows.end - rows.first
    return width + 1 if span[1] == rows.end else width + count - 1


def _shifted(product_PRL: Tensor, rows: _Rows, span: tuple[int, int]) -> Tensor:
    """Queries times table, read as rows against keys: the shift of the module's head."""
    pairs, count, columns = product_PRL.shape
    return product_PRL.as_strided((pairs, count, span[1] - span[0]), (count * columns, columns - 1, 1), count - 1)


def _groups(inputs: list[Tensor], mask: CausalMask, scale: float) -> Iterator[_Group]:
    """All pairs of sequence and head. Sequences with documents of their own are computed one by one."""
    (q, k, v), tables = inputs[:3], inputs[3:]
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    together, in_step = group_size(q.shape[0], q.shape[1], q.shape[2], mask, dtype.itemsize)
    for n in representative(range(0, q.shape[1], together)):
        heads = slice(n, min(n + together, q.shape[1]))
        kv_heads = [head // group for head in range(heads.start, heads.stop)]
        kv: slice | list[int] = heads if group == 1 else kv_heads
        far = far_bias = None
        if tables:
            far, far_bias = _far(tables[1][heads], q.shape[2], dtype), _far(tables[2][heads], q.shape[2], dtype) * scale
        for b in representative(range(0, q.shape[0], in_step)):
            sequences = slice(b, min(b + in_step, q.shape[0]))
            head_q = q[sequences, heads].flatten(0, 1).to(dtype) * scale
            biased = head_q
            if tables:
                bias_P1H = _repeated(tables[0][heads], sequences.stop - b)[:, None]
                biased = torch.add(head_q, bias_P1H.to(dtype), alpha=scale)
            keys, values = (x[sequences][:, kv].flatten(0, 1).to(dtype) for x in (k, v))
            tables_of = [None if x is None else _repeated(x, sequences.stop - b) for x in (far, far_bias)]
            peaked = _may_be_peaked(head_q, biased, keys, far, far_bias)
            yield _Group(sequences, heads, kv_heads, head_q, biased, keys, values, tables_of[0], tables_of[1], peaked)


def _may_be_peaked(
    q_PTH: Tensor, biased_q_PTH: Tensor, k_PTH: Tensor, far_NLH: Tensor | None, far_bias_NL: Tensor | None
) -> bool:
    """Whether to look for negligible weights; on a GPU they cost nothing, and looking would wait for it."""
    if q_PTH.device.type != "cpu":
        return False
    bounds = [product_bound(biased_q_PTH, k_PTH)]
    if far_NLH is not None and far_bias_NL is not None:
        bounds += [product_bound(q_PTH, far_NLH), far_bias_NL.abs().amax()]
    return may_be_peaked(*bounds)


def group_size(batch: int, heads: int, tokens: int, mask: CausalMask, width: int) -> tuple[int, int]:
    """(heads, sequences) of a group, for sums of `width` bytes an element."""
    rows = min(BLOCK, tokens)
    keys = tokens if mask.window is None else min(tokens, mask.window - 1 + rows)
    fitting = max(1, TILE_BYTES // (rows * keys * width))
    together = min(heads, fitting)
    in_step = 1 if together < heads or mask.starts_BT is not None else max(1, min(batch, fitting // heads))
    return together, in_step


def _far(table_NP: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """A table by distance, from T-1 down to 0, and one row of padding."""
    order_T = _table_rows(tokens, table_NP.shape[1], table_NP.device)
    return torch.cat([table_NP[:, order_T], table_NP[:, :1]], dim=1).to(dtype)


def _repeated(x_N: Tensor, times: int) -> Tensor:
    """The heads' tensors once for each sequence: [sequences * heads, ...]."""
    return x_N if times == 1 else x_N.expand(times, *x_N.shape).flatten(0, 1)


def _table_rows(tokens: int, rows: int, device: torch.device) -> Tensor:
    """The table's row of each distance, from T-1 down to 0."""
    return torch.arange(tokens - 1, -1, -1, device=device).clamp(max=rows - 1)


def _forward(
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
    for group in _groups([q, k, v, *tables], mask, scale):
        out_BNTH = o_BNTH[group.sequences, group.heads]
        for rows in _blocks(q.shape[2], mask, group.sequences.start):
            values = [group.v_PTH[:, low:high] for low, high in rows.spans]
            out = torch.bmm(group.weights(rows, mask), values[0] if len(values) == 1 else torch.cat(values, dim=1))
            out_BNTH[:, :, rows.block] = out.view(*out_BNTH.shape[:2], *out.shape[1:])
    return o_BNTH


# One operator to torch.compile, which would otherwise unroll the loop over blocks.
_row_blocks = torch.library.custom_op("attnzoo::row_blocks", _forward, mutates_args=())


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
    mask = CausalMask(window=window, sinks=sinks, starts_BT=starts)
    totals = [
        torch.zeros_like(x, dtype=accumulation_dtype(x.dtype), memory_format=torch.contiguous_format) for x in inputs
    ]
    for group in _groups(inputs, mask, scale):
        sums, grad_PTH = _Sums(group), grad[group.sequences, group.heads].flatten(0, 1)
        for rows in _blocks(inputs[0].shape[2], mask, group.sequences.start):
            sums.add(rows, group.weights(rows, mask), grad_PTH[:, rows.block])
        sums.add_to(totals, scale)
    return [total.to(x.dtype) for x, total in zip(inputs, totals, strict=True)]


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


class _Sums:
    """Gradients of a group. Those of keys, values and tables are summed transposed, where products are faster."""

    def __init__(self, group: _Group) -> None:
        self.group = group
        self.q_PTH, self.biased_q_PTH = torch.zeros_like(group.q_PTH), torch.zeros_like(group.q_PTH)
        self.k_PHT, self.v_PHT = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1]) for x in (group.k_PTH, group.v_PTH))
        self.far_PHL = self.far_bias_PL = None
        if group.far_PLH is not None:
            pairs, distances, head_dim = group.far_PLH.shape
            self.far_PHL = group.far_PLH.new_zeros(pairs, head_dim, distances)
            self.far_bias_PL = group.far_PLH.new_zeros(pairs, distances)

    def add(self, rows: _Rows, weights_PRW: Tensor, grad_PRH: Tensor) -> None:
        """A block's part, from its weights and the gradient of its outputs."""
        group, grad_PRH = self.group, grad_PRH.to(weights_PRW.dtype)
        widths = [high - low for low, high in rows.spans]
        grads = [torch.bmm(grad_PRH, group.v_PTH[:, low:high].mT) for low, high in rows.spans]
        grads_PRW = grads[0] if len(grads) == 1 else torch.cat(grads, dim=2)
        for weights, (low, high) in zip(weights_PRW.split(widths, dim=2), rows.spans, strict=True):
            self.v_PHT[:, :, low:high] += torch.bmm(grad_PRH.mT, weights)
        _softmax_backward.out(grads_PRW, weights_PRW, -1, weights_PRW.dtype, grad_input=grads_PRW)
        for part, span in zip(grads_PRW.split(widths, dim=2), rows.spans, strict=True):
            low, high = span
            self.biased_q_PTH[:, rows.block] += torch.bmm(part, group.k_PTH[:, low:high])
            self.k_PHT[:, :, low:high] += torch.bmm(group.biased_q_PTH[:, rows.block].mT, part)
            if group.far_PLH is not None:
                self._add_relative(rows, span, part)

    def _add_relative(self, rows: _Rows, span: tuple[int, int], grads_PRW: Tensor) -> None:
        """The way back of the shift: what no pair of row and key wrote is zero."""
        group = self.group
        assert group.far_PLH is not None
        assert self.far_PHL is not None
        assert self.far_bias_PL is not None
        pairs, count, width = grads_PRW.shape
        product = grads_PRW.new_empty(pairs, count, _product_width(rows, span))
        if span[1] == rows.end:
            edges = product.view(pairs, -1)
            edges[:, : count - 1], edges[:, count - 1 + count * width :] = 0.0, 0.0
        else:
            product.zero_()
        _shifted(product, rows, span).copy_(grads_PRW)
        where = group.distances(rows, span)
        self.q_PTH[:, rows.block, : group.far_PLH.shape[2]] += torch.bmm(product, group.far_PLH[:, where])
        self.far_PHL[:, :, where] += torch.bmm(group.asking(rows).mT, product)
        self.far_bias_PL[:, where] += product.sum(1)

    def add_to(self, totals: list[Tensor], scale: float) -> None:
        """Adds to the gradients of all inputs. Queries were scaled, keys met scaled queries."""
        group, (q, k, v), tables = self.group, totals[:3], totals[3:]
        heads = len(group.kv_heads)
        q[group.sequences, group.heads] = (self.q_PTH.add_(self.biased_q_PTH) * scale).unflatten(0, (-1, heads))
        for total, part_PHT in ((k, self.k_PHT), (v, self.v_PHT)):
            part_BNTH = part_PHT.unflatten(0, (-1, heads)).mT
            for i, kv in enumerate(group.kv_heads):
                total[group.sequences, kv] += part_BNTH[:, i]
        if tables:
            assert self.far_PHL is not None
            assert self.far_bias_PL is not None
            bias, table, table_bias = (total[group.heads] for total in tables)
            bias.add_(self.biased_q_PTH.unflatten(0, (-1, heads)).sum((0, 2)), alpha=scale)
            _add_rows(table, self.far_PHL.unflatten(0, (-1, heads)).sum(0)[..., :-1].mT)
            _add_rows(table_bias, self.far_bias_PL.unflatten(0, (-1, heads)).sum(0)[:, :-1] * scale)


def _add_rows(target_NP: Tensor, rows_NT: Tensor) -> None:
    """Adds rows by distance, from T-1 down to 0, to a table: only its last row gets more than one, in a fixed order."""
    last, tokens = target_NP.shape[1] - 1, rows_NT.shape[1]
    shared = max(tokens - last, 0)
    target_NP[:, last] += rows_NT[:, :shared].sum(1)
    target_NP[:, : min(last, tokens)] += rows_NT[:, shared:].flip(1)
