"""Edits and reads of classes of keys for few queries, such as those of a decode step: all rows that do the same in one
pass. Keys and values are read once, as without edits, and what is said of a class multiplies the weights of its keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits.classes import class_members, class_table, table_rows
from attnzoo.attention.edits.engine import AttentionCall, class_here
from attnzoo.attention.edits.items import Edit, Here, Move
from attnzoo.attention.edits.order import WeighedByClass, moved_weights, weighed_by_class
from attnzoo.attention.edits.plan import LayerItems
from attnzoo.attention.edits.reading import LayerRecord, masses
from attnzoo.attention.edits.reads import Mass
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.products import with_keys, with_values
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
class _Shared:
    """What rows that do the same have in common in all layers of one plan in one call: the rows and heads that are
    computed; mask: what `terms` reads; hidden: what is added to scores where the mask hides, None: nothing; empty:
    queries that see nothing; places_BKS: where entries stand, as `table_rows` says.

    items: what each means, the same for all rows; queries: which of them each item names, row by row; busy: rows of
    which anything is said. changes: whether anything is edited; edited_BNR1: where, None: everywhere; moves: one
    move of weight is all there is."""

    rows: slice
    heads: slice
    kv_heads: slice
    mask: Mask
    hidden: Tensor | None
    empty: Tensor | None
    places_BKS: Tensor | None
    items: tuple[tuple[Any, Here], ...]
    queries: tuple[tuple[tuple[bool, ...], ...], ...]
    busy: tuple[int, ...]
    changes: bool
    edited_BNR1: Tensor | None
    moves: bool

    def scores(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """(scores_BNRS, empty_BNR1) as `weighed_by_class` takes them."""
        dtype, empty = accumulation_dtype(call.q_BNTH.dtype), self.empty
        content, bias = call.terms(_cut(call.q_BNTH, self.rows), self.mask)
        content = _cut_heads(content, self.heads)
        if content.dtype == dtype:  # a product in half precision is rounded before it is scaled
            scores = self._by_kv(content * call.scale, with_keys, call.keys_BKSH)
        else:
            scores = self._by_kv(content, with_keys, call.keys_BKSH).to(dtype) * call.scale
        if self.hidden is not None:
            scores = scores + self.hidden
        if call.log_counts_BKS is not None:
            counts = _of_query_heads(call.log_counts_BKS, call.q_BNTH.shape[1])
            scores = scores + _cut_heads(_cut(counts, self.rows), self.heads)[:, :, None]
        if bias is not None:
            scores = scores + _cut_heads(bias, self.heads)
            nothing = scores.amax(-1, keepdim=True) == float("-inf")  # a bias hides, too
            scores, empty = scores.masked_fill(nothing, 0.0), nothing if empty is None else nothing | empty
        return scores, empty

    def outputs(self, call: AttentionCall, weights_BNRS: Tensor) -> Tensor:
        """out_BNRH in the dtype of the queries."""
        return self._by_kv(weights_BNRS, with_values, call.values_BKSH).to(call.q_BNTH.dtype)

    def _by_kv(self, x_BNRX: Tensor, product: Callable[[Tensor, Tensor], Tensor], held_BKSX: Tensor) -> Tensor:
        """A product with what the kv heads hold: the queries of heads that share one are rows of it."""
        held = _cut_heads(_cut(held_BKSX, self.rows), self.kv_heads)
        batch, heads, queries, width = x_BNRX.shape
        return product(x_BNRX.reshape(batch, held.shape[1], -1, width), held).reshape(batch, heads, queries, -1)


def few_changes(call: AttentionCall, rows: slice, records: Sequence[LayerRecord], step: int | None) -> list[FewChanged]:
    """Runs the edits and reads of rows whose plans are of one kind: returns what edits change, and adds what is read to
    the records."""
    plans, shapes = tuple([record.plan for record in records]), (call.q_BNTH.shape, call.keys_BKSH.shape)
    given = ((rows.start, rows.stop), call.queries.numbers[rows], plans, step, shapes, call.q_BNTH.dtype)
    if call.mask.parallel:  # positions in the sequence of a row are not those of the mask
        shared = _shared(call.mask, call.positions_BKS, *given)
    else:
        shared = call.mask.once(_streamed, *given)
    if not shared.busy:
        return []
    for row in shared.busy:
        records[row].engines.add("dense")
    sets = [record.sets(call.q_BNTH.device) for record in records]
    scores_BNRS, empty_BNR1 = shared.scores(call)
    if shared.moves and empty_BNR1 is None:
        parts = [record.moved(scores_BNRS) for record in records]
        table = class_table([part.table for part in parts], shared.places_BKS, scores_BNRS, sets[0])
        weights_BNRS = moved_weights(scores_BNRS, parts[0], table)
    else:
        table = class_table([each.table for each in sets], shared.places_BKS, scores_BNRS, sets[0])
        found = weighed_by_class(scores_BNRS, empty_BNR1, table, shared.items)
        _add(shared, records, call.queries.positions_BT[rows], found)
        if not shared.changes:
            return []
        weights_BNRS = found.edited_(table)
    return [FewChanged(rows, shared.heads, shared.outputs(call, weights_BNRS), shared.edited_BNR1)]


def _streamed(mask: Mask, *given: Any) -> _Shared:
    assert mask.key_positions_BKS is not None
    return _shared(mask, mask.key_positions_BKS, *given)


def _shared(
    mask: Mask,
    positions_BKS: Tensor,
    ends: tuple[int, int],
    numbers: tuple[tuple[int, ...], ...],
    plans: tuple[LayerItems, ...],
    step: int | None,
    shapes: tuple[torch.Size, torch.Size],
    dtype: torch.dtype,
) -> _Shared:
    """ends: of the rows; numbers: positions of their queries; shapes: of the queries and of the keys."""
    (_, num_heads, tokens, _), (_, kv_heads, entries, _) = shapes
    rows, device, group = slice(*ends), positions_BKS.device, num_heads // kv_heads
    first, last = plans[0].heads[0] // group, plans[0].heads[-1] // group
    heads, held = slice(first * group, (last + 1) * group), slice(first, last + 1)
    hidden, empty = (
        None if x is None else _cut_heads(_cut(_of_query_heads(x, num_heads), rows), heads)
        for x in mask.bias(tokens, entries, device, accumulation_dtype(dtype))
    )
    assert hidden is not None
    places = table_rows(positions_BKS, min(plan.keys for plan in plans))
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
    return _Shared(
        rows=rows,
        heads=heads,
        kv_heads=held,
        mask=_cut_mask(mask, rows, shapes, device),
        hidden=None if known(hidden == 0) else hidden,
        empty=empty,
        places_BKS=None if places is None else _cut_heads(_cut(places, rows), held),
        items=tuple(items),
        queries=tuple(asked),
        busy=tuple(row for row in range(len(numbers)) if any(any(each[row]) for each in asked)),
        changes=bool(edited),
        edited_BNR1=None if everywhere else torch.stack(edited).any(0),
        moves=len(items) == 1 and isinstance(items[0][0], Move),
    )


def _cut_mask(mask: Mask, rows: slice, shapes: tuple[torch.Size, torch.Size], device: torch.device) -> Mask:
    """What `terms` reads of a mask, of some rows."""
    (batch, _, tokens, _), (_, _, entries, _) = shapes
    if not mask.parallel and rows.stop - rows.start == batch:
        return mask
    queries_BT, keys_BKS = mask.positions(tokens, entries, device)
    return Mask(
        causal=mask.causal,
        prefix_B=None if mask.prefix_B is None else mask.prefix_B[rows],
        query_positions_BT=_cut(queries_BT, rows),
        key_positions_BKS=_cut(keys_BKS, rows),
    )


def _named(named: tuple[int, ...], heads: slice, queries: tuple[tuple[bool, ...], ...], device: torch.device) -> Tensor:
    """named_BNR1 of some heads and queries."""
    heads_N = torch.tensor([head in named for head in range(heads.start, heads.stop)], device=device)
    return (heads_N[:, None] & torch.tensor(queries, device=device)[:, None])[..., None]


def _add(shared: _Shared, records: Sequence[LayerRecord], queries_BT: Tensor, found: WeighedByClass) -> None:
    """Adds what was read of each row to its record, and where nothing could be seen."""
    first = shared.heads.start
    for number, ((item, here), queries) in enumerate(zip(shared.items, shared.queries, strict=True)):
        if isinstance(item, Mass) and any(map(any, queries)):
            values = masses(item, here, found.after_BNRC)
            for row, record in enumerate(records):
                if any(queries[row]):
                    meant = record.plan.items[number]
                    every = len(meant.heads) == shared.heads.stop - first
                    heads = slice(None) if every else torch.tensor(meant.heads) - first
                    chosen = slice(None) if all(queries[row]) else torch.tensor(queries[row]).nonzero()[:, 0]
                    of_row = {name: x[row] for name, x in values.items()}
                    record.add(meant, of_row, heads, chosen, queries_BT[row])
    if found.empty_BNR1 is not None:
        empty_BNR1 = torch.stack([(found.empty_BNR1 & here.named_NR1) for _, here in shared.items]).any(0)
        for row, head, query in empty_BNR1[..., 0].nonzero().tolist():
            records[row].empty.append((head + first, int(queries_BT[row, query])))


def _of_query_heads(x: Tensor, heads: int) -> Tensor:
    """What is said of query heads, of kv heads or of all, for query heads or for all."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def _cut(x: Tensor, rows: slice) -> Tensor:
    """Some rows of what is said of all, or of all in one."""
    return x[rows] if x.shape[0] > 1 and rows.stop - rows.start < x.shape[0] else x


def _cut_heads(x: Tensor, heads: slice) -> Tensor:
    return x[:, heads] if x.shape[1] > 1 and heads.stop - heads.start < x.shape[1] else x
