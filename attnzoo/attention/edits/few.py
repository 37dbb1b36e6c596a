"""Edits and reads of classes of keys for few queries, such as those of a decode step: all rows that do the same in one
pass. Keys and values are read once, as without edits, and what is said of a class multiplies the weights of its keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits.classes import ClassTable, class_members, table_rows
from attnzoo.attention.edits.engine import AttentionCall, class_here
from attnzoo.attention.edits.items import Edit, Here
from attnzoo.attention.edits.order import WeighedByClass, weighed_by_class
from attnzoo.attention.edits.plan import LayerItems
from attnzoo.attention.edits.reading import LayerRecord, masses
from attnzoo.attention.edits.reads import Mass
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.products import with_keys, with_values
from attnzoo.ops.common.recent import recent
from attnzoo.ops.common.rows import known
from attnzoo.types import accumulation_dtype


@dataclass(frozen=True)
class FewChanged:
    """New outputs of some rows and heads of a call; named_BNR1: where they take the place of the old ones, None:
    everywhere."""

    rows: slice
    heads: slice
    out_BNRH: Tensor
    named_BNR1: Tensor | None

    def put(self, out_BNTH: Tensor) -> None:
        """Writes what has changed."""
        place = out_BNTH[self.rows, self.heads]
        place.copy_(self.out_BNRH if self.named_BNR1 is None else torch.where(self.named_BNR1, self.out_BNRH, place))


@dataclass(frozen=True)
class _Asked:
    """What rows that do the same ask for in one call. items: what each means, the same for all rows; queries: which of
    them each item names, row by row. changes: whether anything is edited; edited_BNR1: where, None: everywhere."""

    items: tuple[tuple[Any, Here], ...]
    queries: tuple[tuple[tuple[bool, ...], ...], ...]
    changes: bool
    edited_BNR1: Tensor | None

    def asks(self, row: int) -> bool:
        """Whether any item says anything of a row."""
        return any(any(queries[row]) for queries in self.queries)


def few_changes(
    call: AttentionCall, rows: slice, records: Sequence[LayerRecord], step: int | None
) -> Iterator[FewChanged]:
    """Runs the edits and reads of rows whose plans are of one kind: yields what edits change, and adds what is read to
    the records."""
    part = _RowsAndHeads.of(call, rows, records[0].plan.heads)
    plans = tuple(record.plan for record in records)
    asked = _asked(call.queries_BT, rows, part.heads, plans, step)
    busy = [record for row, record in enumerate(records) if asked.asks(row)]
    if not busy:
        return
    for record in busy:
        record.engines.add("dense")
    scores_BNRS, empty_BNR1 = part.scores()
    table = part.table(records, scores_BNRS.dtype)
    found = weighed_by_class(scores_BNRS, empty_BNR1, table, asked.items)
    _add(part, records, asked, found)
    if asked.changes:
        yield FewChanged(rows, part.heads, part.outputs(found.edited_(table)), asked.edited_BNR1)


@recent
def _asked(queries_BT: Tensor, rows: slice, heads: slice, plans: tuple[LayerItems, ...], step: int | None) -> _Asked:
    """Layers of the same plan share it."""
    numbers, device = queries_BT[rows].tolist(), queries_BT.device
    members = class_members(plans[0].sets, plans[0].codes, device)
    shown = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    asked, items, edited = [], [], []
    for meant in zip(*(plan.items for plan in plans), strict=True):
        queries = tuple(
            tuple(each.in_call(step) and each.queries.covers(at, at) for at in row)
            for each, row in zip(meant, numbers, strict=True)
        )
        every = len(meant[0].heads) == heads.stop - heads.start and all(map(all, queries))
        named_BNR1 = shown if every else _named(meant[0].heads, heads, queries, device)
        asked.append(queries)
        items.append((meant[0].item, class_here(meant[0], named_BNR1, shown, members, every)))
        if isinstance(meant[0].item, Edit) and any(map(any, queries)):
            edited.append(named_BNR1)
    everywhere = not edited or any(each is shown for each in edited)
    where = None if everywhere else torch.stack(edited).any(0)
    return _Asked(tuple(items), tuple(asked), bool(edited), where)


def _named(named: tuple[int, ...], heads: slice, queries: tuple[tuple[bool, ...], ...], device: torch.device) -> Tensor:
    """named_BNR1 of some heads and queries."""
    heads_N = torch.tensor([head in named for head in range(heads.start, heads.stop)], device=device)
    return (heads_N[:, None] & torch.tensor(queries, device=device)[:, None])[..., None]


def _add(part: "_RowsAndHeads", records: Sequence[LayerRecord], asked: _Asked, found: WeighedByClass) -> None:
    """Adds what was read of each row to its record, and where nothing could be seen."""
    first = part.heads.start
    for number, ((item, here), queries) in enumerate(zip(asked.items, asked.queries, strict=True)):
        if isinstance(item, Mass) and any(map(any, queries)):
            values = masses(item, here, found.after_BNRC)
            for row, record in enumerate(records):
                if any(queries[row]):
                    meant = record.plan.items[number]
                    every = len(meant.heads) == part.heads.stop - first
                    heads = slice(None) if every else torch.tensor(meant.heads) - first
                    chosen = slice(None) if all(queries[row]) else torch.tensor(queries[row]).nonzero()[:, 0]
                    of_row = {name: x[row] for name, x in values.items()}
                    record.add(meant, of_row, heads, chosen, part.call.queries_BT[part.rows][row])
    if found.empty_BNR1 is not None:
        empty_BNR1 = torch.stack([(found.empty_BNR1 & here.named_NR1) for _, here in asked.items]).any(0)
        numbers = part.call.queries_BT[part.rows]
        for row, head, query in empty_BNR1[..., 0].nonzero().tolist():
            records[row].empty.append((head + first, int(numbers[row, query])))


@dataclass(frozen=True)
class _RowsAndHeads:
    """Some rows of a call, and the heads of some kv heads."""

    call: AttentionCall
    rows: slice
    heads: slice
    kv_heads: slice

    @staticmethod
    def of(call: AttentionCall, rows: slice, heads: Sequence[int]) -> "_RowsAndHeads":
        group = call.q_BNTH.shape[1] // call.keys_BKSH.shape[1]
        first, last = heads[0] // group, heads[-1] // group
        return _RowsAndHeads(call, rows, slice(first * group, (last + 1) * group), slice(first, last + 1))

    def of_kv(self, x: Tensor) -> Tensor:
        """The part of what is said of kv heads, or of all in one."""
        return _cut(x, self.rows, self.kv_heads)

    def of_query(self, x: Tensor) -> Tensor:
        """The part of what is said of query heads, of kv heads or of all, for query heads or for all."""
        heads = self.call.q_BNTH.shape[1]
        return _cut(
            x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1), self.rows, self.heads
        )

    def table(self, records: Sequence[LayerRecord], dtype: torch.dtype) -> ClassTable:
        """Of which class every entry is."""
        sets = [record.sets(self.call.q_BNTH.device) for record in records]
        rows_BKS = table_rows(self.call.positions_BKS, min([each.keys for each in sets]))
        rows_BKS = None if rows_BKS is None else self.of_kv(rows_BKS)
        return ClassTable.of(sets, rows_BKS, self.call.keys_BKSH.shape[2], dtype)

    def scores(self) -> tuple[Tensor, Tensor | None]:
        """(scores_BNRS, empty_BNR1) as `weighed_by_class` takes them."""
        call = self.call
        queries, entries, device = call.q_BNTH.shape[2], call.keys_BKSH.shape[2], call.q_BNTH.device
        dtype = accumulation_dtype(call.q_BNTH.dtype)
        hidden, empty = _hidden(*call.mask.bias(queries, entries, device, dtype))
        empty = None if empty is None else self.of_query(empty)
        content, bias = self._terms(queries, entries)
        content = _cut_heads(content, self.heads)
        if content.dtype == dtype:  # a product in half precision is rounded before it is scaled
            scores = self._by_kv(content * call.scale, with_keys, call.keys_BKSH)
        else:
            scores = self._by_kv(content, with_keys, call.keys_BKSH).to(dtype) * call.scale
        if hidden is not None:
            scores = scores + self.of_query(hidden)
        if call.log_counts_BKS is not None:
            scores = scores + self.of_query(call.log_counts_BKS)[:, :, None]
        if bias is not None:
            scores = scores + _cut_heads(bias, self.heads)
            nothing = scores.amax(-1, keepdim=True) == float("-inf")  # a bias hides, too
            scores, empty = scores.masked_fill(nothing, 0.0), nothing if empty is None else nothing | empty
        return scores, empty

    def _terms(self, queries: int, entries: int) -> tuple[Tensor, Tensor | None]:
        call, rows = self.call, self.rows
        mask = call.mask
        if mask.parallel or len(call.q_BNTH[rows]) < len(call.q_BNTH):
            queries_BT, keys_BKS = mask.positions(queries, entries, call.q_BNTH.device)
            mask = Mask(
                causal=mask.causal,
                prefix_B=None if mask.prefix_B is None else mask.prefix_B[rows],
                query_positions_BT=queries_BT if len(queries_BT) == 1 else queries_BT[rows],
                key_positions_BKS=keys_BKS if len(keys_BKS) == 1 else keys_BKS[rows],
            )
        every = rows.stop - rows.start == len(call.q_BNTH)
        return call.terms(call.q_BNTH if every else call.q_BNTH[rows], mask)

    def outputs(self, weights_BNRS: Tensor) -> Tensor:
        """out_BNRH in the dtype of the queries."""
        out = self._by_kv(weights_BNRS, with_values, self.call.values_BKSH)
        return out.to(self.call.q_BNTH.dtype)

    def _by_kv(self, x_BNRX: Tensor, product: Callable[[Tensor, Tensor], Tensor], held_BKSX: Tensor) -> Tensor:
        """A product with what the kv heads hold: the queries of heads that share one are rows of it."""
        held = self.of_kv(held_BKSX)
        batch, heads, queries, width = x_BNRX.shape
        out = product(x_BNRX.reshape(batch, held.shape[1], -1, width), held)
        return out.reshape(batch, heads, queries, -1)


@recent
def _hidden(bias_BKTS: Tensor, empty_BKT1: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`Mask.bias`; None for a bias that hides nothing. Layers share it."""
    return None if known(bias_BKTS == 0) else bias_BKTS, empty_BKT1


def _cut(x: Tensor, rows: slice, heads: slice) -> Tensor:
    """Some rows and heads of what is said of all, or of all in one."""
    return _cut_heads(x[rows] if len(x) > 1 and rows.stop - rows.start < len(x) else x, heads)


def _cut_heads(x: Tensor, heads: slice) -> Tensor:
    return x[:, heads] if x.shape[1] > 1 and heads.stop - heads.start < x.shape[1] else x
