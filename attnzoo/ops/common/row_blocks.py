"""Attention a block of query rows at a time, with or without tables of relative position, for masks without pairs.

Memory is linear in T, forward and backward: a block of `BLOCK` rows holds its scores against all visible keys, takes
the softmax of whole rows, and is forgotten; the backward pass computes it again from q, k and v.

The relative shift costs nothing. With the table reversed, column c of `q R^T` belongs to distance W-1-c for W keys,
and row r needs it at column c + r - (rows-1): one column further left than row r+1. In a buffer whose rows are W+1
wide that is the same memory read with rows of width W from offset rows-1 on, so the product of queries and table is
written in the one shape and added to that of queries and keys in the other (Transformer-XL shifts a padded copy
instead, arXiv 1901.02860, appendix B). Rows that see no key after them multiply with no distance below 0: what lands
right of the diagonal is of other rows, and is masked.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attnzoo.derived_memory import representative
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.negligible import may_be_peaked, product_bound, softmax_of_peaked_
from attnzoo.ops.common.tables import Tables, add_rows
from attnzoo.types import accumulation_dtype

BLOCK = 128
"""Rows of a block: fewer make products that are slow, more make memory."""
TILE_BYTES = 2 << 20
"""Scores of a block in one product, of as many heads, then sequences, as fit: few meetings of threads, all in cache."""

_softmax = torch.ops.aten._softmax
_softmax_backward = torch.ops.aten._softmax_backward_data


def row_block_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, tables: Tables | None, mask: Mask, scale: float
) -> Tensor:
    """o_BNTH of the parallel form, for every mask of it but pairs; with tables, the scores of `relative_sdpa`."""
    assert mask.parallel
    assert mask.pairs is None
    relative = [] if tables is None else [tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP]
    fields, numbers = _flat(mask, 0 if tables is None else tables.future_rows)
    # The first call of a custom operator imports the compiler (seconds), and a server's first prompt would wait for it.
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    run = _forward if plain else _row_blocks
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, relative, fields, numbers, scale)
    return out


def _flat(mask: Mask, future_rows: int) -> tuple[list[Tensor], list[int]]:
    """A mask and the table's rows for keys after the query, as an operator takes them: the tensors that are there, and
    numbers, the last three of which say which are."""
    fields = (mask.prefix_B, mask.starts_BT, mask.keys_BS)
    numbers = [future_rows, int(mask.causal), mask.window or 0, mask.sinks]
    return [x for x in fields if x is not None], numbers + [int(x is not None) for x in fields]


def _unflat(fields: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Mask, int]:
    future_rows, causal, window, sinks, *there = numbers
    given = iter(fields)
    prefix, starts, keys = (next(given) if here else None for here in there)
    past = Mask(causal=bool(causal), window=window or None, sinks=sinks)
    return replace(past, prefix_B=prefix, starts_BT=starts, keys_BS=keys), future_rows


@dataclass(frozen=True)
class _Rows:
    """A block of query rows [first, end) and the keys it meets: [low, high), and the sinks before low, if any. `ahead`:
    rows may see keys after them; else high is end."""

    first: int
    end: int
    low: int
    high: int
    ahead: bool
    sinks: tuple[int, int] | None

    @property
    def block(self) -> slice:
        return slice(self.first, self.end)

    @property
    def spans(self) -> list[tuple[int, int]]:
        near = (self.low, self.high)
        return [near] if self.sinks is None else [self.sinks, near]


def _blocks(tokens: int, entries: int, mask: Mask, sequences: slice) -> Iterator[_Rows]:
    """The blocks of sequences that are computed together; keys that no row of a block sees are left out."""
    prefix = 0 if mask.prefix_B is None else min(int(mask.prefix_B[sequences].max()), tokens)
    for first in representative(range(0, tokens, BLOCK), largest="last"):
        end = min(first + BLOCK, tokens)
        if not mask.causal or first < prefix:
            yield _Rows(first, end, 0, max(end, prefix) if mask.causal else entries, True, None)
            continue
        earliest = latest = 0
        if mask.starts_BT is not None:
            starts = mask.starts_BT[sequences, first:end]
            earliest, latest = int(starts.min()), int(starts.max())
        low = earliest if mask.window is None else max(earliest, first - mask.window + 1)
        sinks = (earliest, min(latest + mask.sinks, low))
        yield _Rows(first, end, low, end, False, sinks if mask.sinks and sinks[1] > sinks[0] else None)


def _hide(scores_PRW: Tensor, rows: _Rows, span: tuple[int, int], mask: Mask, sequences: slice) -> Tensor | None:
    """Sets scores of hidden keys to -inf, in place. Returns seeing_BR (or 1), which see a key, where not all may."""
    low, high = span
    if mask.causal and not rows.ahead and high > rows.first:
        corner = scores_PRW[:, :, rows.first - low :]
        corner.masked_fill_(torch.ones_like(corner[0], dtype=torch.bool).triu(1), -math.inf)
    diagonal = mask.window is None and mask.starts_BT is None and not (mask.causal and rows.ahead)
    if diagonal and mask.keys_BS is None:
        return None
    seen_BRW = mask.of_block(sequences, range(rows.first, rows.end), range(low, high), scores_PRW.device)
    scores_PRW.unflatten(0, (sequences.stop - sequences.start, -1)).masked_fill_(~seen_BRW[:, None], -math.inf)
    return None if mask.keys_BS is None else seen_BRW.any(-1)


@dataclass(frozen=True)
class _Group:
    """P pairs of a sequence and a query head that are computed together, in the accumulation dtype; queries scaled.

    `far_PLH`, `far_bias_PL`: the tables from the largest to the least distance of `_reach` and one row of padding.
    `peaked`: some weights may be negligible (`attnzoo.ops.common.negligible`).
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

    def weights(self, rows: _Rows, mask: Mask) -> Tensor:
        """Softmax over all spans, side by side: [P, R, sum of widths]."""
        tiles, seeing = [], []
        for span in rows.spans:
            tile = self._scores(rows, span)
            seeing.append(_hide(tile, rows, span, mask, self.sequences))
            tiles.append(tile)
        scores = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)
        weights = softmax_of_peaked_(scores) if self.peaked else _softmax.out(scores, -1, False, out=scores)
        some = [x for x in seeing if x is not None]
        if some:  # a row that sees nothing: zeros, and no gradient
            blind_BR = ~reduce(torch.logical_or, some)
            weights.unflatten(0, (-1, len(self.kv_heads))).masked_fill_(blind_BR[:, None, :, None], 0.0)
        return weights

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
    """Distances between the rows and a span; those of keys that are hidden behind the diagonal are left out."""
    width, count = span[1] - span[0], rows.end - rows.first
    return width + 1 if span[1] == rows.end and not rows.ahead else width + count - 1


def _shifted(product_PRL: Tensor, rows: _Rows, span: tuple[int, int]) -> Tensor:
    """Queries times table, read as rows against keys: the shift of the module's head."""
    pairs, count, columns = product_PRL.shape
    return product_PRL.as_strided((pairs, count, span[1] - span[0]), (count * columns, columns - 1, 1), count - 1)


def _groups(inputs: list[Tensor], mask: Mask, future_rows: int, scale: float) -> Iterator[_Group]:
    """All pairs of sequence and head. Long sequences with a mask of their own are computed one by one."""
    (q, k, v), tables = inputs[:3], inputs[3:]
    dtype, group = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
    tokens, entries = q.shape[2], k.shape[2]
    together, in_step = group_size(q.shape[0], q.shape[1], tokens, entries, mask, dtype.itemsize)
    order_L = None
    if tables:
        order_L = _table_rows(_reach(mask, tokens, entries), future_rows, tables[1].shape[1], q.device)
    for n in representative(range(0, q.shape[1], together)):
        heads = slice(n, min(n + together, q.shape[1]))
        kv_heads = [head // group for head in range(heads.start, heads.stop)]
        kv: slice | list[int] = heads if group == 1 else kv_heads
        far = far_bias = None
        if order_L is not None:
            far, far_bias = _far(tables[1][heads], order_L, dtype), _far(tables[2][heads], order_L, dtype) * scale
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
    if q_PTH.device.type != "cpu" or not k_PTH.numel():
        return False
    bounds = [product_bound(biased_q_PTH, k_PTH)]
    if far_NLH is not None and far_bias_NL is not None:
        bounds += [product_bound(q_PTH, far_NLH), far_bias_NL.abs().amax()]
    return may_be_peaked(*bounds)


def group_size(batch: int, heads: int, tokens: int, entries: int, mask: Mask, width: int) -> tuple[int, int]:
    """(heads, sequences) of a group, for sums of `width` bytes an element."""
    rows = min(BLOCK, tokens)
    keys = entries if mask.window is None else min(entries, mask.window - 1 + rows)
    fitting = max(1, TILE_BYTES // max(1, rows * keys * width))
    together = min(heads, fitting)
    alone = together < heads or (mask.of_rows and tokens > BLOCK)  # blocks leave out what their own mask hides
    return together, 1 if alone else max(1, min(batch, fitting // heads))


def _reach(mask: Mask, tokens: int, entries: int) -> tuple[int, int]:
    """(behind, ahead) that blocks of rows meet: more than `Mask.reach` where a prefix ends inside a block."""
    behind, ahead = mask.reach(tokens, entries)
    return behind, max(ahead, min(BLOCK, tokens) - 1) if mask.causal and mask.ahead else ahead


def _far(table_NP: Tensor, order_L: Tensor, dtype: torch.dtype) -> Tensor:
    """A table by distance, from the farthest down, and one row of padding."""
    return torch.cat([table_NP[:, order_L], table_NP[:, :1]], dim=1).to(dtype)


def _repeated(x_N: Tensor, times: int) -> Tensor:
    """The heads' tensors once for each sequence: [sequences * heads, ...]."""
    return x_N if times == 1 else x_N.expand(times, *x_N.shape).flatten(0, 1)


def _table_rows(reach: tuple[int, int], future_rows: int, rows: int, device: torch.device) -> Tensor:
    """The table's row of each distance, from the farthest behind to the farthest ahead."""
    behind, ahead = reach
    return torch.arange(behind + future_rows, future_rows - ahead - 1, -1, device=device).clamp(0, rows - 1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    fields: Sequence[Tensor],
    numbers: Sequence[int],
    scale: float,
) -> Tensor:
    """`tables`: u_NH, table_NPH and table_bias_NP, or nothing for plain attention; `fields`, `numbers`: of `_flat`."""
    mask, future_rows = _unflat(fields, numbers)
    o_BNTH = q.new_empty(*q.shape[:3], v.shape[-1])
    for group in _groups([q, k, v, *tables], mask, future_rows, scale):
        out_BNTH = o_BNTH[group.sequences, group.heads]
        for rows in _blocks(q.shape[2], k.shape[2], mask, group.sequences):
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
    fields: Sequence[Tensor],
    numbers: Sequence[int],
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v and the tables."""
    mask, future_rows = _unflat(fields, numbers)
    totals = [
        torch.zeros_like(x, dtype=accumulation_dtype(x.dtype), memory_format=torch.contiguous_format) for x in inputs
    ]
    tokens, entries = inputs[0].shape[2], inputs[1].shape[2]
    for group in _groups(inputs, mask, future_rows, scale):
        sums, grad_PTH = _Sums(group), grad[group.sequences, group.heads].flatten(0, 1)
        for rows in _blocks(tokens, entries, mask, group.sequences):
            sums.add(rows, group.weights(rows, mask), grad_PTH[:, rows.block])
        sums.add_to(totals, _reach(mask, tokens, entries), future_rows, scale)
    return [total.to(x.dtype) for x, total in zip(inputs, totals, strict=True)]


@_row_blocks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_row_blocks_backward.register_fake
def _(grad: Tensor, inputs: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, tables, fields, *rest = inputs
    ctx.save_for_backward(q, k, v, *tables, *fields)
    ctx.fields, ctx.rest = len(fields), rest


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = [*ctx.saved_tensors]
    inputs, fields = saved[: len(saved) - ctx.fields], saved[len(saved) - ctx.fields :]
    q, k, v, *tables = _row_blocks_backward(grad, inputs, fields, *ctx.rest)
    return q, k, v, tables, [None] * len(fields), None, None


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
        if span[1] == rows.end and not rows.ahead:
            edges = product.view(pairs, -1)
            edges[:, : count - 1], edges[:, count - 1 + count * width :] = 0.0, 0.0
        else:
            product.zero_()
        _shifted(product, rows, span).copy_(grads_PRW)
        where = group.distances(rows, span)
        self.q_PTH[:, rows.block, : group.far_PLH.shape[2]] += torch.bmm(product, group.far_PLH[:, where])
        self.far_PHL[:, :, where] += torch.bmm(group.asking(rows).mT, product)
        self.far_bias_PL[:, where] += product.sum(1)

    def add_to(self, totals: list[Tensor], reach: tuple[int, int], future_rows: int, scale: float) -> None:
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
            far_NLH = self.far_PHL.unflatten(0, (-1, heads)).sum(0)[..., :-1].mT
            far_bias_NL = self.far_bias_PL.unflatten(0, (-1, heads)).sum(0)[:, :-1] * scale
            for total, rows_NL in ((table, far_NLH), (table_bias, far_bias_NL)):
                add_rows(total, rows_NL, reach, future_rows)
