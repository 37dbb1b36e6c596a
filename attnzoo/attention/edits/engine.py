"""Attention with edits, for the heads and queries that they name alone: key by key, or class of keys by class of
keys."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnzoo.attention.edits.cost import ROWS, rows_at_once
from attnzoo.attention.edits.items import Edit, Here
from attnzoo.attention.edits.order import Weighed, weighed
from attnzoo.attention.edits.passes import ByClass, Passes, class_passes
from attnzoo.attention.edits.placed import Placed
from attnzoo.attention.edits.plan import Meant
from attnzoo.attention.edits.reading import LayerRecord, read_values
from attnzoo.attention.edits.reads import Read
from attnzoo.attention.edits.spans import Chosen
from attnzoo.ops.common.masks import Mask, sees
from attnzoo.ops.common.negligible import without_negligible
from attnzoo.types import accumulation_dtype

FEW = 16
"""Fewer queries than this take every key's score even where classes of keys would do (`few`): their scores are small,
and keys of one class would be copied out of the others."""

Terms = Callable[[Tensor, Mask], tuple[Tensor, Tensor | None]]
Weigh = Callable[[Tensor, Tensor, tuple[Tensor, Tensor], list[tuple[Meant, Here]]], Weighed]


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, as engines read it. terms: the scores as content . key * scale + bias (`Position.terms`);
    mask: what is visible, with the positions that `terms` reads. queries, positions_BKS: positions in the sequence
    that edits speak of, -1 for what is not of it. log_counts_BKS: logarithm of the number of tokens that an entry
    stands for, part of its score. approximate: keys lack channels. uncounted: an entry may stand for several
    tokens that are not counted. weigh: weights from products of content and keys, for a variant without softmax."""

    q_BNTH: Tensor
    keys_BKSH: Tensor
    values_BKSH: Tensor
    mask: Mask
    terms: Terms
    scale: float
    queries: Placed
    positions_BKS: Tensor
    log_counts_BKS: Tensor | None = None
    approximate: bool = False
    uncounted: bool = False
    weigh: Weigh | None = None


@dataclass(frozen=True)
class Changed:
    """New outputs of some heads and tokens of one row; named_NR: where they take the place of the old ones."""

    row: int
    heads_N: Tensor
    tokens_R: Tensor
    out_NRH: Tensor
    named_NR: Tensor

    def put(self, out_BNTH: Tensor) -> None:
        """Writes what has changed."""
        out_NTH, tokens = out_BNTH[self.row], span(self.tokens_R)
        if isinstance(tokens, slice) and len(self.heads_N) == len(out_NTH) and bool(self.named_NR.all()):
            out_NTH[:, tokens] = self.out_NRH
            return
        at = (self.heads_N[:, None], self.tokens_R)
        out_NTH[at] = torch.where(self.named_NR[..., None], self.out_NRH, out_NTH[at])


def is_few(call: AttentionCall) -> bool:
    """Whether `few_changes` is the way for classes of keys; else it is `row_changes`."""
    return call.q_BNTH.shape[2] < FEW and not _needs_gradient(call)


def row_changes(
    call: AttentionCall, rows: slice, records: Sequence[LayerRecord], step: int | None
) -> Iterator[Changed]:
    """Runs the edits and reads of one row: yields what edits change, and adds what is read to the record."""
    row, record = rows.start, records[0]
    items = [meant for meant in record.plan.items if meant.in_call(step)]
    queries_T = call.queries.positions_BT[row]
    wanted_T = torch.zeros_like(queries_T, dtype=torch.bool)
    for meant in items:
        wanted_T |= meant.queries.holds(queries_T)
    tokens = wanted_T.nonzero()[:, 0]
    if not len(tokens):
        return
    partitioned = record.plan.engine == "partitioned" and len(tokens) >= FEW and not _needs_gradient(call)
    record.engines.add("partitioned" if partitioned else "dense")
    if partitioned:
        yield from _by_class(call, row, record, items, tokens)
        return
    for tokens_R in tokens.split(rows_at_once(len(record.plan.heads), call.keys_BKSH.shape[2])):
        yield from _by_key(call, row, record, items, tokens_R)


def _by_key(
    call: AttentionCall, row: int, record: LayerRecord, items: list[Meant], tokens_R: Tensor
) -> Iterator[Changed]:
    """Every key has a score of its own."""
    block = _Block.of(call, row, tokens_R, torch.tensor(record.plan.heads, device=tokens_R.device))
    kv_N = block.heads_N // (call.q_BNTH.shape[1] // call.keys_BKSH.shape[1])
    dtype = accumulation_dtype(call.q_BNTH.dtype)
    products = _by_kv(block.content_NRH, call.keys_BKSH[row], kv_N, transposed=True).to(dtype)
    positions_NS = _per_head(call.positions_BKS[row], kv_N)
    heres = [(meant, here_of(meant, block, positions_NS, record)) for meant in items]
    if call.weigh is not None:
        where = (block.queries_R, positions_NS)
        found = call.weigh(products, block.visible_NRS, where, heres)
    else:
        scores = products * call.scale if block.added_NRS is None else products * call.scale + block.added_NRS
        found = weighed(scores, block.visible_NRS, [(meant.item, here) for meant, here in heres])
    values_KSH = call.values_BKSH[row]

    def with_values(weights_NRS: Tensor) -> Tensor:
        if call.weigh is None:  # a softmax leaves denormal numbers, which a CPU multiplies slowly
            weights_NRS = without_negligible(weights_NRS)
        return _by_kv(weights_NRS, values_KSH, kv_N)

    yield from _finish(found, with_values, heres, block, record, call.q_BNTH.dtype)


def _by_kv(x_NRX: Tensor, held_KSX: Tensor, kv_N: Tensor, transposed: bool = False) -> Tensor:
    """Products of every head's rows with the keys (transposed) or the values of its kv head, in at least float32. Where
    all heads take part, the rows of those that share a kv head are rows of one product, and nothing is copied."""
    kv_heads, heads = len(held_KSX), len(x_NRX)
    exact = accumulation_dtype(torch.promote_types(x_NRX.dtype, held_KSX.dtype))
    if heads % kv_heads or not torch.equal(kv_N, torch.arange(heads, device=kv_N.device) // (heads // kv_heads)):
        held_NSX = held_KSX[kv_N].to(exact)
        return x_NRX.to(exact) @ (held_NSX.mT if transposed else held_NSX)
    rows_KLX = x_NRX.to(exact).reshape(kv_heads, -1, x_NRX.shape[-1])
    held = held_KSX.to(exact)
    return (rows_KLX @ (held.mT if transposed else held)).view(heads, x_NRX.shape[1], -1)


def _by_class(
    call: AttentionCall, row: int, record: LayerRecord, items: list[Meant], tokens_L: Tensor
) -> Iterator[Changed]:
    """One fused pass for every class of keys; a class's score is the logarithm of its sum of exponentials."""
    plan, device = record.plan, tokens_L.device
    heads_N = torch.tensor(plan.heads, device=device)
    sets = record.sets(device)
    class_KS = sets.classes(call.positions_BKS[row])
    groups = []
    for kv_heads, first, last in _groups(plan.heads, call):
        every = len(kv_heads) == call.keys_BKSH.shape[1]
        kv_K = torch.tensor(kv_heads, device=device)
        keys, values = (x[row] if every else x[row].index_select(0, kv_K) for x in (call.keys_BKSH, call.values_BKSH))
        class_S = class_KS[0 if len(class_KS) == 1 else kv_heads[0]]
        groups.append((slice(first, last), ByClass.of(keys, values, class_S, len(plan.codes))))
    order_S = groups[0][1].order_S if len(groups) == 1 else None  # visibility is computed in the order of classes, then
    for tokens_R in tokens_L.split(ROWS):
        block = _Block.of(call, row, tokens_R, heads_N, order_S)
        passes = []
        for heads, held in groups:
            visible, added = _cut(block.visible_NRS, heads), block.added_NRS
            added = None if added is None else _cut(added, heads)
            if order_S is None:
                visible, added = held.sorted(visible), None if added is None else held.sorted(added)
            passes.append(class_passes(block.content_NRH[heads], held, visible, added, call.scale))
        lse_NRC = passes[0].lse_NRC if len(passes) == 1 else torch.cat([each.lse_NRC for each in passes])
        visible_NRC = lse_NRC > float("-inf")
        heres = [(meant, class_here(meant, _named(meant, block), visible_NRC, sets.members)) for meant in items]
        found = weighed(lse_NRC, visible_NRC, [(meant.item, here) for meant, here in heres])
        with_values = partial(_of_groups, groups=[heads for heads, _ in groups], passes=passes)
        yield from _finish(found, with_values, heres, block, record, call.q_BNTH.dtype)


def _of_groups(weights_NRC: Tensor, groups: list[slice], passes: list[Passes]) -> Tensor:
    """Outputs of all heads, where classes have the given weights."""
    found = [each.total(weights_NRC[heads]) for heads, each in zip(groups, passes, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def span(tokens_R: Tensor) -> Tensor | slice:
    """An index for rising numbers: of a range without gaps a slice, which copies nothing."""
    first, last = int(tokens_R[0]), int(tokens_R[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens_R) else tokens_R


def _cut(x_NRS: Tensor, heads: slice) -> Tensor:
    return x_NRS if len(x_NRS) == 1 else x_NRS[heads]


def _groups(heads: tuple[int, ...], call: AttentionCall) -> list[tuple[list[int], int, int]]:
    """(kv heads, first, last) of heads that one pass can take: all where every kv head has the same entries and as many
    of the heads, else those of one kv head."""
    kv_heads = call.keys_BKSH.shape[1]
    counts = [0] * kv_heads
    for head in heads:
        counts[head // (call.q_BNTH.shape[1] // kv_heads)] += 1
    used = [kv for kv in range(kv_heads) if counts[kv]]
    if call.positions_BKS.shape[1] == 1 and len({counts[kv] for kv in used}) == 1:
        return [(used, 0, len(heads))]
    ends = [sum(counts[: kv + 1]) for kv in used]
    return [([kv], end - counts[kv], end) for kv, end in zip(used, ends, strict=True)]


def _finish(
    found: Weighed,
    with_values: Callable[[Tensor], Tensor],
    heres: list[tuple[Meant, Here]],
    block: "_Block",
    record: LayerRecord,
    dtype: torch.dtype,
) -> Iterator[Changed]:
    """Adds to reads, and yields the new outputs where there are edits."""
    named_NR1 = torch.zeros_like(found.empty_NR1)
    edited = torch.zeros_like(named_NR1)
    for meant, here in heres:
        named_NR1 = named_NR1 | here.named_NR1
        if isinstance(meant.item, Read):
            heads, rows = (here.named_NR1.any(axis).flatten().nonzero()[:, 0] for axis in (1, 0))
            if len(rows):
                record.add(meant, read_values(meant, here, found), heads, rows, block.queries_R)
        elif isinstance(meant.item, Edit):
            edited = edited | here.named_NR1
    for head, query in (found.empty_NR1 & named_NR1)[..., 0].nonzero().tolist():
        record.empty.append((int(block.heads_N[head]), int(block.queries_R[query])))
    if bool(edited.any()):
        out_NRH = with_values(found.weights_NRS).to(dtype)
        yield Changed(block.row, block.heads_N, block.tokens_R, out_NRH, edited[..., 0])


@dataclass(frozen=True)
class _Block:
    """Some heads and tokens of a row: content_NRH, and what is added to scores besides content . key. visible_NRS and
    added_NRS may have one head for all, and one query."""

    row: int
    heads_N: Tensor
    tokens_R: Tensor
    queries_R: Tensor
    visible_NRS: Tensor
    content_NRH: Tensor
    added_NRS: Tensor | None

    @staticmethod
    def of(call: AttentionCall, row: int, tokens_R: Tensor, heads_N: Tensor, order_S: Tensor | None = None) -> "_Block":
        """order_S: of entries, None: as they are."""
        num_heads, entries = call.q_BNTH.shape[1], call.keys_BKSH.shape[2]
        kv_N = heads_N // (num_heads // call.keys_BKSH.shape[1])
        queries_1R, keys_1KS, visible = _seen(call.mask, row, tokens_R, entries, order_S)
        plain = Mask(
            causal=call.mask.causal,
            prefix_B=None if call.mask.prefix_B is None else call.mask.prefix_B[row : row + 1],
            query_positions_BT=queries_1R,
            key_positions_BKS=keys_1KS,
        )
        content, bias = call.terms(call.q_BNTH[row : row + 1, :, span(tokens_R)], plain)
        added = None if bias is None else bias[0].index_select(0, heads_N)
        if call.log_counts_BKS is not None:
            counts = _per_head(call.log_counts_BKS[row], kv_N)[:, None]
            added = counts if added is None else added + counts
        added = None if added is None else _ordered(added, order_S)
        per_query_head = visible if len(visible) == num_heads else None
        visible_NRS = _per_head(visible, kv_N) if per_query_head is None else per_query_head[heads_N]
        if added is not None:
            shown = added > float("-inf")  # a bias of -inf hides as a mask does: an edit cannot show the key
            visible_NRS = visible_NRS if bool(shown.all()) else visible_NRS & shown
        return _Block(
            row,
            heads_N,
            tokens_R,
            call.queries.positions_BT[row, tokens_R],
            visible_NRS,
            content[0] if len(heads_N) == num_heads else content[0].index_select(0, heads_N),
            added,
        )


def _ordered(x: Tensor, order_S: Tensor | None) -> Tensor:
    return x if order_S is None else x.index_select(-1, order_S)


def _seen(
    mask: Mask, row: int, tokens_R: Tensor, entries: int, order_S: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(query positions [1, R], key positions [1, K or 1, S], visible [K, N or 1, R, S]) of some tokens of one row; what
    is visible with entries in an order."""
    device = tokens_R.device
    queries_BT, keys_BKS = mask.positions(int(tokens_R.max()) + 1, entries, device)
    queries_R, keys_KS = queries_BT[min(row, len(queries_BT) - 1)][tokens_R], keys_BKS[min(row, len(keys_BKS) - 1)]
    visible = sees(
        queries_R[None, :, None],
        _ordered(keys_KS, order_S)[:, None],
        causal=mask.causal,
        window=mask.window,
        sinks=mask.sinks,
        prefix=None if mask.prefix_B is None else mask.prefix_B[row],
        starts=None if mask.starts_BT is None else mask.starts_BT[row, tokens_R][None, :, None],
        exists=None if mask.keys_BS is None else _ordered(mask.keys_BS[row][None, None], order_S),
    )
    if mask.pairs is not None:
        pairs = mask.pairs[row] if mask.pairs.dim() == 4 else mask.pairs[row][None]
        visible = visible & _ordered(pairs[:, tokens_R], order_S)
    return queries_R[None], keys_KS[None], visible


def here_of(meant: Meant, block: _Block, positions_NS: Tensor, record: LayerRecord) -> Here:
    """What an item means among the keys of a block."""
    sets, held = dict(meant.sets), record.sets(positions_NS.device)
    placed = meant.item.placed
    return Here(
        named_NR1=_named(meant, block),
        visible_NRS=block.visible_NRS,
        keys={name: held.holds(each, positions_NS)[:, None] for name, each in sets.items()},
        heads_N=block.heads_N,
        head_row_N=_head_rows(meant, block) if placed else None,
        query_row_R=meant.queries.rank(block.queries_R) if placed else None,
        key_row_NS=sets["keys"].rank(positions_NS) if placed else None,
        positions_NS=positions_NS.expand(len(block.heads_N), -1),
    )


def class_here(
    meant: Meant, named_NR1: Tensor, visible_NRC: Tensor, members: dict[Chosen, Tensor], everywhere: bool = False
) -> Here:
    """What an item means among classes of keys; members: as `class_members` has them."""
    keys = {name: members[held] for name, held in meant.sets}
    return Here(named_NR1, visible_NRC, keys, everywhere=everywhere)


def _named(meant: Meant, block: _Block) -> Tensor:
    heads, queries_R = len(block.heads_N), meant.queries.holds(block.queries_R)
    if len(meant.heads) == heads:  # a block has no heads beside those that items name
        return queries_R[None, :, None].expand(heads, -1, 1)
    named_N = torch.isin(block.heads_N, torch.tensor(meant.heads, device=block.heads_N.device))
    return (named_N[:, None] & queries_R)[..., None]


def _head_rows(meant: Meant, block: _Block) -> Tensor:
    return torch.searchsorted(torch.tensor(meant.heads, device=block.heads_N.device), block.heads_N)


def _per_head(x_KS: Tensor, kv_N: Tensor) -> Tensor:
    """What each kv head has, or one for all, for query heads."""
    return x_KS if len(x_KS) == 1 else x_KS[kv_N]


def _needs_gradient(call: AttentionCall) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q_BNTH, call.keys_BKSH, call.values_BKSH))
