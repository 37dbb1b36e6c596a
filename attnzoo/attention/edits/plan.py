"""From words to numbers: what every layer has to do for one sequence, and what it costs, before anything is
computed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from attnzoo.attention.edits.bounds import check_numbers
from attnzoo.attention.edits.classes import class_codes
from attnzoo.attention.edits.cost import EditCost, layer_cost, returned_bytes
from attnzoo.attention.edits.items import CopyHead, Edit, Item, PutScores, PutWeights, ScoreEdit, WeightEdit
from attnzoo.attention.edits.reads import Entropy, Map, Mass, Read
from attnzoo.attention.edits.spans import (
    FAR,
    Chosen,
    Interval,
    Sinks,
    TokenLayout,
    check_rising,
    chosen,
    picked,
    picked_steps,
)
from attnzoo.attention.edits.traits import LayerSizes
from attnzoo.attention.edits.wire import NAMES, item_from_json, item_to_json

MAX_BYTES = 256 << 20
"""Bytes that all reads of a plan may return, unless the caller says otherwise."""
MAX_CLASSES = 4
"""Keys that edits tell apart in more classes than this are computed one by one."""
MAX_SINKS = 8
"""Different Sinks of one layer: keys fall into twice as many classes with each."""

Engine = Literal["partitioned", "dense"]


@dataclass(frozen=True)
class Meant:
    """An item of the list, with numbers for words, in one layer. index: its place in the list; queries: those whose
    step is meant; calls: numbers of the calls that are meant; sets: its sets of keys by name."""

    index: int
    item: Item
    heads: tuple[int, ...]
    queries: Chosen
    calls: tuple[Interval, ...]
    sets: tuple[tuple[str, Chosen], ...]

    def in_call(self, step: int | None) -> bool:
        """Whether it says anything in a call of this number; None: calls are not counted."""
        return step is None or any(start <= step < stop for start, stop in self.calls)


@dataclass(frozen=True, eq=False)
class LayerItems:
    """What one layer does for one sequence. heads: all that must be computed; sets: the sets of keys to tell apart;
    codes: their classes, as `class_codes` has them; keys: how many there are in the end."""

    items: tuple[Meant, ...]
    engine: Engine
    heads: tuple[int, ...]
    sets: tuple[Chosen, ...]
    codes: tuple[int, ...]
    keys: int

    @cached_property
    def sinks(self) -> tuple[Sinks, ...]:
        """What must be known of hidden states."""
        return tuple(dict.fromkeys(each for held in self.sets for each in held.sinks))

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """Equal for what does the same, but for where its queries and sets of keys are."""
        sets = {held: number for number, held in enumerate(self.sets)}
        items = [(m.item, m.heads, tuple((name, sets[held]) for name, held in m.sets)) for m in self.items]
        return self.engine, self.codes, tuple(items)


class Edits:
    """Reads and edits of attention, in the order in which they apply. Nothing is checked against a model yet: `plan`
    does that. Equal and hashed by what it says."""

    def __init__(self, *items: Item) -> None:
        for index, item in enumerate(items):
            if type(item) not in NAMES:
                raise ValueError(f"edits[{index}]={item!r} is no read and no edit: give Add(...), Mass(...), ...")
        self.items = items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edits) and self.items == other.items

    def __hash__(self) -> int:
        return hash(self.items)

    def __repr__(self) -> str:
        return f"Edits({', '.join(map(repr, self.items))})"

    def to_json(self) -> list[dict[str, Any]]:
        """A list of objects; see `wire`."""
        return [item_to_json(item) for item in self.items]

    @classmethod
    def from_json(cls, data: Any, where: str = "edits") -> "Edits":
        """The inverse of `to_json`. Raises ValueError that names the field."""
        if not isinstance(data, Sequence) or isinstance(data, str):
            raise ValueError(f"{where}={data!r} must be a list of reads and edits")
        return cls(*(item_from_json(each, f"{where}[{index}]") for index, each in enumerate(data)))

    @property
    def fingerprint(self) -> str:
        """The same for what says the same."""
        return _digest(self.to_json())

    def plan(
        self,
        sizes: Sequence[LayerSizes],
        layout: TokenLayout,
        new_tokens: int = 0,
        *,
        max_bytes: int = MAX_BYTES,
        streams: bool = True,
    ) -> "EditPlan":
        """What every layer has to do for a sequence of layout.prompt tokens and up to `new_tokens` after them.

        streams: `extend` will be used, too, not `forward` alone. Raises ValueError for whatever cannot be done: numbers
        out of range, words that mean nothing, variants that cannot, and reads of more than `max_bytes`.
        """
        if not isinstance(layout, TokenLayout):
            raise ValueError(f"layout={layout!r} must be TokenLayout(prompt=...)")
        if type(new_tokens) is not int or new_tokens < 0:
            raise ValueError(f"new_tokens={new_tokens!r} must be at least 0")
        if type(max_bytes) is not int or max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes!r} must be at least 0")
        total = layout.prompt + new_tokens
        layers: list[list[Meant]] = [[] for _ in sizes]
        for index, item in enumerate(self.items):
            at = f"edits[{index}].{NAMES[type(item)]}"
            for layer in picked(item.where.layers, len(sizes), f"{at}.where.layers"):
                meant = _meant(index, item, sizes[layer], layout, total, streams, at, layer)
                if not (isinstance(item, Edit) and item.idle):
                    layers[layer].append(meant)
        for number, items in enumerate(layers):
            check_numbers([(NAMES[type(each.item)], each) for each in items], sizes[number], number)
        gathered = [_gathered(meant, sizes[n], layout, total) for n, meant in enumerate(layers)]
        same = {
            each: each for each in gathered
        }  # one object for all layers that do the same: what it needs is made once
        plan = EditPlan(self, tuple(sizes), layout, total, tuple(same[each] for each in gathered))
        _check_bytes(plan, max_bytes)
        return plan


@dataclass(frozen=True)
class EditPlan:
    """What `Edits.plan` found. total: tokens of prompt and continuation; layers: None where there is nothing to do."""

    edits: Edits
    sizes: tuple[LayerSizes, ...]
    layout: TokenLayout
    total: int
    layers: tuple[LayerItems | None, ...]

    @property
    def fingerprint(self) -> str:
        """Plans of the same fingerprint leave the same keys and values behind, and read the same."""
        layouts = [self.layout] if self.layout.context is None else [self.layout, self.layout.context]
        said = [[x.prompt, x.steps, x.places] for x in layouts]
        return _digest([self.edits.to_json(), self.total, said])

    @property
    def changes(self) -> bool:
        """Whether any layer's attention is changed; else it is read only."""
        return any(isinstance(m.item, Edit) for layer in self.layers if layer for m in layer.items)

    @property
    def cost(self) -> EditCost:
        """What it costs beyond the unedited pass over all tokens."""
        return EditCost(
            tuple(
                layer_cost(layer, size, self.total, self.keys(size))
                for layer, size in zip(self.layers, self.sizes, strict=True)
            )
        )

    def keys(self, size: LayerSizes) -> int:
        """Number of keys that a layer sees in the end."""
        return self.layout.context.prompt if size.context and self.layout.context else self.total


def _meant(
    index: int, item: Item, size: LayerSizes, layout: TokenLayout, total: int, streams: bool, at: str, layer: int
) -> Meant:
    """The item in one layer. Raises ValueError where the layer cannot, or the words mean nothing in it."""
    _check_can(item, size, streams, at, layer)
    where = item.where
    heads = picked(where.heads, size.num_heads, f"{at}.where.heads")
    queries = chosen(where.queries, layout, total, f"{at}.where.queries")
    if queries.sinks:
        raise ValueError(f"{at}.where.queries={where.queries!r}: queries must be known before; only keys may be Sinks")
    steps, calls = picked_steps(where.steps, layout, f"{at}.where.steps")
    queries = queries.also_in(Chosen(steps)).within(0, total)
    if not queries.intervals:
        raise ValueError(f"{at}.where selects nothing: no query of {where.queries!r} is in steps={where.steps!r}")
    key_layout, keys = layout, total
    if size.context:
        if layout.context is None:
            raise ValueError(f"{at}: layer {layer} attends to a context; say by TokenLayout(context=...) what is in it")
        key_layout, keys = layout.context, layout.context.prompt
    sets = {name: chosen(of, key_layout, keys, f"{at}.{_field(item, name)}") for name, of in item.key_sets().items()}
    for name, held in sets.items():
        for sinks in held.sinks:
            if size.context or not sinks.channels or max(sinks.channels) >= (size.model_dim or FAR):
                way_out = "a context has no hidden states here" if size.context else f"there are {size.model_dim}"
                raise ValueError(f"{at}.{name}={sinks!r}: no such channels in layer {layer} ({way_out})")
    own = chosen(where.keys, key_layout, keys, f"{at}.where.keys")
    if own.sinks and isinstance(item, Read) and not isinstance(item, Mass):
        raise ValueError(f"{at}.where.keys: {type(item).__name__} needs keys that are known before; Mass reads Sinks")
    if isinstance(item, PutScores | PutWeights):
        check_rising(where.heads, lambda part: _ends(picked((part,), size.num_heads, at)), f"{at}.where.heads")
        for name, named, of, end in (("queries", where.queries, layout, total), ("keys", where.keys, key_layout, keys)):
            check_rising(named, partial(_edges_of, layout=of, total=end, at=at), f"{at}.where.{name}")
    item.check(len(heads), queries, own, size.num_heads, at)
    sets.setdefault("keys", own)
    return Meant(index, item, heads, queries, calls, tuple(sets.items()))


def _field(item: Item, name: str) -> str:
    """The field of an item that says a set of keys."""
    if isinstance(item, Mass) and item.bins:
        return name
    return {"keys": "where.keys", "of": "only_heads.of"}.get(name, name)


def _ends(numbers: tuple[int, ...]) -> tuple[int, int]:
    return numbers[0], numbers[-1]


def _edges_of(part: Any, *, layout: TokenLayout, total: int, at: str) -> tuple[int, int]:
    intervals = chosen(part, layout, total, at).intervals
    return intervals[0][0], intervals[-1][1] - 1


def _check_can(item: Item, size: LayerSizes, streams: bool, at: str, layer: int) -> None:
    can = size.editing
    wanted, allowed = "be read", can.reads
    if isinstance(item, ScoreEdit) or (isinstance(item, Map) and item.what == "scores"):
        wanted, allowed = "have its scores " + ("edited" if isinstance(item, ScoreEdit) else "read"), can.scores
    elif isinstance(item, WeightEdit):
        wanted, allowed = "have its weights edited", can.weights
    if isinstance(item, Entropy) and not can.softmax:
        wanted, allowed = "have an entropy: its weights are no distribution", False
    if not allowed or (streams and not can.streams):
        how = " in extend" if allowed else ""
        raise ValueError(
            f"{at}: the attention of layer {layer} ({size.variant}) cannot {wanted}{how}: {can.why_not}; leave layer "
            f"{layer} out of where.layers"
        )


def _gathered(items: list[Meant], size: LayerSizes, layout: TokenLayout, total: int) -> LayerItems | None:
    if not items:
        return None
    heads = {head for each in items for head in each.heads}
    heads |= {each.item.source for each in items if isinstance(each.item, CopyHead)}
    sets = tuple(dict.fromkeys(held for each in items for name, held in each.sets))
    keys = layout.context.prompt if size.context and layout.context else total
    sinks = dict.fromkeys(each for held in sets for each in held.sinks)
    if len(sinks) > MAX_SINKS:
        raise ValueError(
            f"edits name {len(sinks)} different Sinks in one layer; at most {MAX_SINKS}: give one of them several "
            "channels"
        )
    inside, codes = class_codes(sets, keys)
    dense = not size.editing.softmax or any(each.item.dense for each in items) or len(inside) > MAX_CLASSES
    return LayerItems(tuple(items), "dense" if dense else "partitioned", tuple(sorted(heads)), sets, codes, keys)


def _check_bytes(plan: EditPlan, most: int) -> None:
    per_item = [
        (returned_bytes(each, plan.keys(size)), each, number)
        for number, (layer, size) in enumerate(zip(plan.layers, plan.sizes, strict=True))
        if layer
        for each in layer.items
    ]
    total = sum(found for found, _, _ in per_item)
    if total > most:
        found, each, number = max(per_item, key=lambda entry: entry[0])
        raise ValueError(
            f"the reads return {total:,} bytes, above the limit of {most:,}; edits[{each.index}] takes {found:,} of "
            f"them in layer {number}: name fewer layers, heads, queries or keys, give TopKeys a smaller k, or read "
            "Mass or TopKeys in place of a Map"
        )


def _digest(what: Any) -> str:
    text = json.dumps(what, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
