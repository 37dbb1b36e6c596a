"""Edits and reads of classes of keys for few queries, such as those of a decode step: all rows that do the same in one
pass. Keys and values are read once, as without edits, and what is said of a class multiplies the weights of its keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.attention.edits.classes import ClassTable, table_rows
from attnzoo.attention.edits.engine import AttentionCall, class_here
from attnzoo.attention.edits.items import Edit, Here
from attnzoo.attention.edits.order import WeighedByClass, weighed_by_class
from attnzoo.attention.edits.plan import Meant
from attnzoo.attention.edits.reading import LayerRecord, masses
from attnzoo.attention.edits.reads import Mass
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.products import with_keys, with_values
from attnzoo.ops.common.recent import recent
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
    """One item of all rows. queries: which ones it names, row by row; here: the same for all of them."""

    meant: tuple[Meant, ...]
    queries: tuple[tuple[bool, ...], ...]
    here: Here

    @property
    def some(self) -> bool:
        return any(map(any, self.queries))


def few_changes(
    call: AttentionCall, rows: slice, records: Sequence[LayerRecord], step: int | None
) -> Iterator[FewChanged]:
    """Runs the edits and reads of rows whose plans are of one kind: yields what edits change, and adds what is read to
    the records."""
    part = _RowsAndHeads.of(call, rows, records[0].plan.heads)
    asked = _asked(part, records, step)
    if not any(each.some for each in asked):
        return
    for number, record in enumerate(records):
        if any(any(each.queries[number]) for each in asked):
            record.engines.add("dense")
    scores_BNRS, empty_BNR1 = part.scores()
    table = ClassTable.of([record.sets(call.q_BNTH.device) for record in records], *part.entries(), scores_BNRS.dtype)
    items = [(each.meant[0].item, each.here) for each in asked]
    found = weighed_by_class(scores_BNRS, empty_BNR1, table, items)
    _add(part, records, asked, found)
    named = [each.here.named_NR1 for each in asked if isinstance(each.meant[0].item, Edit) and each.some]
    if not named:
        return
    everywhere = any(each.numel() == 1 for each in named)
    named_BNR1 = None if everywhere else torch.stack(named).any(0)
    yield FewChanged(rows, part.heads, part.outputs(found.edited_(table)), named_BNR1)


def _asked(part: "_RowsAndHeads", records: Sequence[LayerRecord], step: int | None) -> list[_Asked]:
    numbers = _numbers(part.call.queries_BT)[part.rows]
    device = part.call.q_BNTH.device
    sets, shown = records[0].sets(device), torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    named: dict[tuple, Tensor] = {}
    asked = []
    for meant in zip(*(record.plan.items for record in records), strict=True):
        queries = tuple(
            tuple(each.in_call(step) and each.queries.covers(at, at) for at in row)
            for each, row in zip(meant, numbers, strict=True)
        )
        key = (meant[0].heads, queries)
        if key not in named:
            every = len(key[0]) == part.heads.stop - part.heads.start and all(map(all, queries))
            named[key] = shown if every else part.named(*key)
        asked.append(_Asked(meant, queries, class_here(meant[0], named[key], shown, sets)))
    return asked


@recent
def _numbers(queries_BT: Tensor) -> list[list[int]]:
    found: list[list[int]] = queries_BT.tolist()
    return found


def _add(part: "_RowsAndHeads", records: Sequence[LayerRecord], asked: list[_Asked], found: WeighedByClass) -> None:
    """Adds what was read of each row to its record, and where nothing could be seen."""
    first = part.heads.start
    for each in asked:
        meant = each.meant[0]
        if isinstance(meant.item, Mass) and each.some:
            values = masses(meant.item, each.here, found.after_BNRC)
            every = len(meant.heads) == part.heads.stop - first
            heads = slice(None) if every else torch.tensor(meant.heads) - first
            for number, record in enumerate(records):
                if any(each.queries[number]):
                    queries = each.queries[number]
                    chosen = slice(None) if all(queries) else torch.tensor(queries).nonzero()[:, 0]
                    of_row = {name: x[number] for name, x in values.items()}
                    record.add(each.meant[number], of_row, heads, chosen, part.call.queries_BT[part.rows][number])
    if found.empty_BNR1 is not None:
        empty_BNR1 = torch.stack([(found.empty_BNR1 & each.here.named_NR1) for each in asked]).any(0)
        numbers = _numbers(part.call.queries_BT)[part.rows]
        for row, head, query in empty_BNR1[..., 0].nonzero().tolist():
            records[row].empty.append((head + first, numbers[row][query]))


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
        return self._cut(x, self.kv_heads)

    def of_query(self, x: Tensor) -> Tensor:
        """The part of what is said of query heads, of kv heads or of all, for query heads or for all."""
        heads = self.call.q_BNTH.shape[1]
        return self._cut(x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1), self.heads)

    def _cut(self, x: Tensor, heads: slice) -> Tensor:
        x = x if len(x) == 1 else x[self.rows]
        return x if x.shape[1] == 1 else x[:, heads]

    def named(self, heads: tuple[int, ...], queries: tuple[tuple[bool, ...], ...]) -> Tensor:
        """named_BNR1 of some heads and queries."""
        device = self.call.q_BNTH.device
        heads_N = torch.tensor([head in heads for head in range(self.heads.start, self.heads.stop)], device=device)
        return (heads_N[:, None] & torch.tensor(queries, device=device)[:, None])[..., None]

    def entries(self) -> tuple[Tensor, bool]:
        """The entries as `ClassTable.of` takes them."""
        rows_BKS, in_order = table_rows(self.call.positions_BKS)
        return self.of_kv(rows_BKS), in_order

    def scores(self) -> tuple[Tensor, Tensor | None]:
        """(scores_BNRS, empty_BNR1) as `weighed_by_class` takes them."""
        call = self.call
        queries, entries, device = call.q_BNTH.shape[2], call.keys_BKSH.shape[2], call.q_BNTH.device
        dtype = accumulation_dtype(call.q_BNTH.dtype)
        hidden, empty = call.mask.bias(queries, entries, device, dtype)
        empty = None if empty is None else self.of_query(empty)
        content, bias = self._terms(queries, entries)
        products = self._by_kv(content, with_keys, call.keys_BKSH)
        scores = torch.add(self.of_query(hidden), products, alpha=call.scale)
        if call.log_counts_BKS is not None:
            scores = scores + self.of_query(call.log_counts_BKS)[:, :, None]
        if bias is not None:
            scores = scores + bias[:, self.heads]
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
        content, bias = call.terms(call.q_BNTH[rows], mask)
        return content[:, self.heads], bias

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
