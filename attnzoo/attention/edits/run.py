"""Runs of plans: what a model hands to its layers, and what a layer does with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits.engine import AttentionCall, is_few, row_changes
from attnzoo.attention.edits.few import FewChanged, few_changes
from attnzoo.attention.edits.items import Edit
from attnzoo.attention.edits.placed import Placed
from attnzoo.attention.edits.plan import EditPlan, LayerItems
from attnzoo.attention.edits.reading import LayerRecord, Reading
from attnzoo.attention.edits.spans import Chosen, Sinks
from attnzoo.attention.edits.traits import Editing, LayerSizes, layer_sizes
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs


class EditRun:
    """One pass over one sequence under a plan, and what it reads. A new pass needs a new run."""

    def __init__(self, plan: EditPlan) -> None:
        self.plan = plan
        self.records = [None if layer is None else LayerRecord(layer) for layer in plan.layers]
        self.rows = [
            None if record is None else Row(record, plan.total, size)
            for record, size in zip(self.records, plan.sizes, strict=True)
        ]

    @property
    def reading(self) -> Reading:
        """What has been read so far."""
        return Reading(self.plan, self.records)

    def positions(self, layer: int, sinks: Sinks) -> list[int]:
        """Where the layer, whose plan names these sinks by themselves, has found them so far."""
        record = self.records[layer]
        if record is None or record.reached == 0:
            return []
        sets = record.sets(torch.device("cpu"))
        found: list[int] = (sets.rows(Chosen((), (sinks,)))[0, 0].nonzero()[:, 0] - 1).tolist()
        return [position for position in found if 0 <= position < sets.seen]


EditRuns = Sequence[EditRun | None]
"""One entry a row of a batch; None: untouched."""


def check_runs(runs: Any, batch: int | None = None, layers: int | None = None) -> None:
    """Raises ValueError for what is no list of runs, of one for each of `batch` rows, planned for so many layers."""
    if not isinstance(runs, list | tuple):
        raise ValueError(f"edits is a {type(runs).__name__}; give a list with EditRun(plan) or None for each row")
    for row, run in enumerate(runs):
        if run is not None and not isinstance(run, EditRun):
            raise ValueError(f"edits[{row}] is a {type(run).__name__}; give EditRun(plan) for a row, or None")
        if run is not None and layers not in (None, len(run.records)):
            raise ValueError(
                f"edits[{row}] were planned for {len(run.records)} layers, and the model has {layers}; plan them for "
                "this model"
            )
    if batch is not None:
        _check_count(len(runs), batch)


def _check_count(entries: int, batch: int) -> None:
    if entries != batch:
        raise ValueError(f"edits have {entries} entries, and the batch has {batch} rows; None leaves one as it is")


def layer_plan(runs: EditRuns | None, layer: int, step: int | None = None) -> "LayerPlan | None":
    """What one layer does in one call, None where there is nothing to do. step: the number of the call, for plans whose
    steps are calls. Raises ValueError for a run of a model with other layers."""
    return None if runs is None else layer_plans(runs, [layer], step)[0]


def layer_plans(runs: EditRuns, layers: Sequence[int], step: int | None = None) -> "list[LayerPlan | None]":
    """`layer_plan` of several layers."""
    check_runs(runs)
    _check_calls(runs, max(layers, default=0), step)
    rows = [tuple([None if run is None else run.rows[layer] for run in runs]) for layer in layers]
    return [LayerPlan(each, step) if any(each) else None for each in rows]


def _check_calls(runs: EditRuns, layer: int, step: int | None) -> None:
    """Raises ValueError for runs that are not of one sequence each, of plans without this layer, or of another kind of
    steps."""
    for row, run in enumerate(runs):
        if run is None:
            continue
        if row and any(run is other for other in runs[:row]):
            raise ValueError(
                f"edits[{row}] is the run of another row; a run is of one sequence: make EditRun(plan) again"
            )
        if layer >= len(run.records):
            raise ValueError(f"edits[{row}] were planned for {len(run.records)} layers, and there is a layer {layer}")
        calls = run.plan.layout.steps
        if (calls is None) != (step is None):
            raise ValueError(
                f"edits[{row}]: step={step} with TokenLayout(steps={calls}): give the number of the call where steps "
                "are calls, and only there"
            )
        if calls is not None and step is not None and not 0 <= step < calls:
            raise ValueError(f"edits[{row}]: step={step}, and the plan has {calls} calls, from 0 on")


@dataclass(frozen=True)
class Row:
    """One row's share in a call of a layer. total: tokens of the sequence at most; size: the layer as planned."""

    record: LayerRecord
    total: int
    size: LayerSizes


@dataclass
class LayerPlan:
    """What one layer does in one call, row by row; None: untouched. hidden_BTD: hidden states as they enter the block,
    by which `Sinks` are found; None: the layer's input."""

    rows: tuple[Row | None, ...]
    step: int | None = None
    hidden_BTD: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.plans = tuple([None if entry is None else entry.record.plan for entry in self.rows])

    def check_layer(self, attention: Any) -> None:
        """Raises ValueError for plans of another layer than this one: of a variant of which other things can be edited,
        of other heads, or in a dtype that holds larger numbers."""
        if all(entry is None or entry.record.layer == id(attention) for entry in self.rows):
            return
        found = layer_sizes(attention)
        for row, entry in enumerate(self.rows):
            if entry is None:
                continue
            difference = entry.size.difference(found)
            if difference:
                raise ValueError(f"edits[{row}] were planned for {difference}; plan them for this model")
            entry.record.layer = id(attention)

    def check_lengths(self, batch: int, tokens: int, starts_BT: Tensor | None) -> None:
        """As `check_rows`."""
        _check_count(len(self.rows), batch)
        totals = tuple(None if entry is None else entry.total for entry in self.rows)
        _check_lengths(totals, tokens, starts_BT)

    def check_context(self, entries: int | None, exists_BS: Tensor | None) -> None:
        """Raises ValueError for plans of another context than is read: one of `entries` tokens of which some exist, or
        None. Tokens behind the last one that exists may be among the planned ones or not."""
        for row, entry in enumerate(self.rows):
            planned = entry.record.plan.keys if entry is not None and entry.size.context else None
            if entry is None or planned == entries:
                continue
            least = entries
            if entries is not None and exists_BS is not None:
                there = exists_BS[row].nonzero()
                least = int(there[-1]) + 1 if len(there) else 0
                if planned is not None and least <= planned <= entries:
                    continue
            wanted = "no context" if planned is None else f"a context of {planned} tokens"
            found = (
                "none"
                if entries is None
                else f"one of {entries}"
                if least == entries
                else f"one of {least} to {entries}"
            )
            raise ValueError(
                f"edits[{row}] were planned for {wanted}, and the layer reads {found}; say so by "
                "TokenLayout(context=...) and layer_sizes(layer, context=...)"
            )

    def observe(self, x_BTD: Tensor, placed: Placed) -> None:
        """Finds the sinks among the tokens of a call. Raises ValueError for a run that has been there before."""
        _check_count(len(self.rows), x_BTD.shape[0])
        hidden_BTD = x_BTD if self.hidden_BTD is None else self.hidden_BTD
        found: dict[Sinks, list[list[bool]]] = {}
        queries_BT = placed.positions_BT
        for row, (entry, (first, last)) in enumerate(zip(self.rows, placed.ends, strict=True)):
            if entry is None or last < 0:
                continue
            real: Tensor | slice = slice(None)
            if first < 0:
                real = queries_BT[row] >= 0
                first = int(queries_BT[row][real].min())
            _advance(entry.record, row, self.step, first, last)
            some = {}
            for sinks in entry.record.plan.sinks:
                if sinks not in found:
                    found[sinks] = sinks.found_in(hidden_BTD)
                if any(found[sinks][row]):
                    some[sinks] = torch.tensor(found[sinks][row], device=x_BTD.device)[real]
            if entry.record.plan.sinks:
                entry.record.sets(x_BTD.device).observe(some, first, last + 1 - first)

    def check_streams(self, editing: Editing, name: str) -> None:
        """Raises ValueError where edits do not stream."""
        if not editing.streams:
            raise ValueError(f"edits of {name} work in forward alone: {editing.why_not}; call forward over all tokens")

    def replaces(self, num_heads: int, placed: Placed) -> bool:
        """Whether every row has an edit that names all of its heads and queries, so that outputs without edits are not
        needed."""
        return placed.once(_replaced, self.plans, num_heads, self.step)

    def apply(self, call: AttentionCall, out_BNTH: Tensor | None) -> Tensor:
        """The outputs with edits: those of the unedited call, but for the rows, heads and queries that edits name.
        None: all are replaced."""
        shape = (*call.q_BNTH.shape[:3], call.values_BKSH.shape[3])
        new_BNTH = None
        few = is_few(call)
        for rows in call.queries.once(_alike, self.plans, few):
            records = [entry.record for entry in self.rows[rows] if entry is not None]
            for row, record in enumerate(records, rows.start):
                _note(call, row, record)
            changes = few_changes if few and records[0].plan.engine == "partitioned" else row_changes
            for new in changes(call, rows, records, self.step):
                if isinstance(new, FewChanged) and new.named_BNR1 is None and new.out_BNRH.shape == shape:
                    return new.out_BNRH  # all rows and heads were alike
                if new_BNTH is None:
                    new_BNTH = call.q_BNTH.new_zeros(shape) if out_BNTH is None else out_BNTH.clone()
                new.put(new_BNTH)
        if new_BNTH is None:
            return call.q_BNTH.new_zeros(shape) if out_BNTH is None else out_BNTH
        return new_BNTH

    def placed(self, step: StepInputs) -> Placed:
        """Where a chunk stands, the same for all layers of a call. Raises ValueError beyond what was planned."""
        placed = step.once(Placed.of)
        for row, (entry, (_, last)) in enumerate(zip(self.rows, placed.ends, strict=False)):
            if entry is not None and last >= entry.total:
                raise ValueError(
                    f"edits[{row}] were planned for {entry.total} tokens, and here is one at position {last}; plan "
                    "with more new_tokens"
                )
        return placed


def _advance(record: LayerRecord, row: int, step: int | None, first: int, last: int) -> None:
    """Notes how far a run has come, in calls or else in positions."""
    what, at, end = ("position", first, last + 1) if step is None else ("step", step, step + 1)
    if at < record.reached:
        raise ValueError(
            f"edits[{row}] have seen {what} {at} already; a run is one pass over one sequence: make EditRun(plan) again"
        )
    record.reached = end


def _replaced(placed: Placed, plans: tuple[LayerItems | None, ...], num_heads: int, step: int | None) -> bool:
    """`LayerPlan.replaces`."""
    return all(
        plan is not None
        and any(
            isinstance(meant.item, Edit)
            and len(meant.heads) == num_heads
            and meant.in_call(step)
            and meant.queries.covers(first, last)
            for meant in plan.items
        )
        for plan, (first, last) in zip(plans, placed.ends, strict=True)
    )


def _alike(_: Placed, plans: tuple[LayerItems | None, ...], few: bool) -> list[slice]:
    """The rows with edits, of which each slice is computed at once: where queries are few, those that follow each other
    and do the same, else one by one."""

    def kind(numbered: tuple[int, LayerItems | None]) -> Any:
        row, plan = numbered
        return plan and (plan.kind if few and plan.engine == "partitioned" else row + 1)

    same = [[row for row, _ in numbered] for key, numbered in groupby(enumerate(plans), kind) if key is not None]
    return [slice(rows[0], rows[-1] + 1) for rows in same]


def _note(call: AttentionCall, row: int, record: LayerRecord) -> None:
    """Notes what the cache holds of a row."""
    record.heads = call.q_BNTH.shape[1]
    record.held = (call.positions_BKS, call.log_counts_BKS, row)
    record.approximate |= call.approximate
    record.uncounted |= call.uncounted


def row_positions(mask: Mask, batch: int, tokens: int, device: torch.device) -> Tensor:
    """positions [B, T] in the sequence of each row of the parallel form, -1 for padding. Where `starts_BT` cuts a row
    into documents, those of one token are padding (`padding_starts`), and the sequence is the one of more; rows without
    one, or with several, are refused before (`check_rows`) or read by nobody."""
    index_1T = torch.arange(tokens, device=device)[None]
    if mask.starts_BT is None:
        return index_1T.expand(batch, -1)
    start_B = mask.starts_BT[:, -1]
    sizes_BT = _document_sizes(mask.starts_BT)
    start_B = torch.where((sizes_BT > 1).sum(-1) == 1, sizes_BT.argmax(-1), start_B)
    return (index_1T - start_B[:, None]).masked_fill(mask.starts_BT != start_B[:, None], -1)


def check_rows(runs: EditRuns, batch: int, tokens: int, starts_BT: Tensor | None, layers: int | None = None) -> None:
    """Raises ValueError for rows of the parallel form of which their plans do not speak: of several documents, of more
    tokens than were planned, and of a model with another number of layers. Without `starts_BT` nothing says what is
    padding, and a row is only known to have more where every row would."""
    check_runs(runs, batch, layers)
    if starts_BT is not None and starts_BT.shape != (batch, tokens):
        raise ValueError(
            f"starts_BT has shape {list(starts_BT.shape)}; it must be {[batch, tokens]}, one for each token"
        )
    _check_lengths(tuple(None if run is None else run.plan.total for run in runs), tokens, starts_BT)


def _check_lengths(totals: tuple[int | None, ...], tokens: int, starts_BT: Tensor | None) -> None:
    """`check_rows` for what was planned of each row."""
    if all(total is None for total in totals):
        return
    batch = len(totals)
    documents = [1] * batch if starts_BT is None else (_document_sizes(starts_BT) > 1).sum(-1).tolist()
    for row, (total, count) in enumerate(zip(totals, documents, strict=True)):
        if total is not None and count == 0 and tokens > 1:
            raise ValueError(
                f"edits[{row}]: the row holds documents of one token alone, and starts_BT does not say which is the "
                "sequence and which are padding; give it to a call of its own, without padding"
            )
        if total is not None and count > 1:
            raise ValueError(
                f"edits[{row}]: the row holds {count} documents, and a plan speaks of one sequence; give each a row of "
                "its own, or None for this row"
            )
    device = torch.device("cpu") if starts_BT is None else starts_BT.device
    lengths = (row_positions(Mask(starts_BT=starts_BT), batch, tokens, device) >= 0).sum(-1).tolist()
    beyond = [total is not None and length > total for total, length in zip(totals, lengths, strict=True)]
    if beyond and (all(beyond) if starts_BT is None else any(beyond)):
        row = beyond.index(True)
        raise ValueError(
            f"edits[{row}] were planned for {totals[row]} tokens, and the row has {lengths[row]}; plan with more "
            "new_tokens, or say by starts_BT what is padding"
        )


def _document_sizes(starts_BT: Tensor) -> Tensor:
    """[B, T]: how many tokens the document has that starts there, 0 where none does."""
    at_BT = starts_BT.long()
    return torch.zeros_like(at_BT).scatter_add_(1, at_BT, torch.ones_like(at_BT))
