"""Which positions of a sequence a read or an edit speaks of, in words that need no counting of tokens.

Positions are logical: the index of a token in its sequence, whatever padding stands before it, however it was cut into
chunks, and wherever a cache keeps it. A `TokenLayout` says what is where in one sequence; `chosen` turns words into
numbers.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.errors import suggest

ALL = "all"
"""Every position, layer, head or step."""
GENERATED = "generated"
"""The positions after the prompt."""
FAR = 2**40
"""A position beyond any sequence."""
MAX_DEPTH = 32
"""Lists and Excepts that may stand in one another."""

FEW_TOKENS = 16
"""Numbers of so many tokens are looked at one by one."""

Interval = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Positions start, ..., stop - 1; without `stop`, start alone; with stop="end", up to the prompt's end. Numbers
    below 0 count from the prompt's end: Span(-1) is its last token."""

    start: int
    stop: int | Literal["end"] | None = None

    def __post_init__(self) -> None:
        if type(self.start) is not int or not (self.stop in (None, "end") or type(self.stop) is int):
            raise ValueError(f'Span({self.start!r}, {self.stop!r}) must be whole numbers; stop may be "end" or None')

    @staticmethod
    def after(name: str) -> "After":
        """All that comes after a named span, generated tokens included."""
        return After(name)


@dataclass(frozen=True)
class After:
    """What comes after a named span, generated tokens included."""

    name: str


@dataclass(frozen=True)
class Sinks:
    """Tokens that gather attention whatever the query: those whose hidden state x, as it enters the block, has
    |x_c| / rms(x) of at least `tau` in one of the `channels` (Kang et al. 2025, arXiv 2503.03321)."""

    channels: tuple[int, ...]
    tau: float

    def __post_init__(self) -> None:
        several = isinstance(self.channels, Iterable) and not isinstance(self.channels, str)
        object.__setattr__(self, "channels", tuple(self.channels) if several else self.channels)
        if not several or not self.channels or any(type(c) is not int or c < 0 for c in self.channels):
            raise ValueError(f"Sinks.channels={self.channels!r} must be a list of one or more channel numbers")
        if type(self.tau) not in (int, float) or not 0 < self.tau < FAR:
            raise ValueError(f"Sinks.tau={self.tau!r} must be a number above 0; 20 is usual")

    def found(self, x_BTD: Tensor) -> Tensor:
        """sink_BT (bool)."""
        x = _exact(x_BTD.detach())
        largest_BT = _norm(x.index_select(-1, _tensor(self.channels, x.device)), float("inf"), -1)
        return largest_BT >= _norm(x, 2, -1) * (self.tau * x.shape[-1] ** -0.5)

    def found_in(self, x_BTD: Tensor) -> list[list[bool]]:
        """`found`, row by row. Of few tokens numbers are compared one by one, which takes less time than operations on
        tensors take to start."""
        if x_BTD.device.type != "cpu" or x_BTD.shape[0] * x_BTD.shape[1] > FEW_TOKENS:
            found: list[list[bool]] = self.found(x_BTD).tolist()
            return found
        x, least = _exact(x_BTD), self.tau * x_BTD.shape[-1] ** -0.5
        named, norms = x.index_select(-1, _tensor(self.channels, x.device)).tolist(), _norm(x, 2, -1).tolist()
        return [
            [max(map(abs, some)) >= least * norm for some, norm in zip(*row, strict=True)]
            for row in zip(named, norms, strict=True)
        ]


_norm = torch.linalg.vector_norm


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Except:
    """All positions but these."""

    of: "Positions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", normal_positions(self.of, "Except.of", MAX_DEPTH - 1))


@dataclass(frozen=True)
class NoPlace:
    """Stands in `TokenLayout.spans` for a name whose tokens are not known. why: what is said to who uses it."""

    why: str


Positions = str | int | Span | After | Sinks | Except | tuple[Any, ...]
"""ALL, GENERATED, the name of a span, one position, any of the classes above, or a tuple of these: their union."""


def normal_positions(positions: Any, where: str, levels: int = MAX_DEPTH) -> Any:
    """The positions, with tuples for lists, so that they can be compared and hashed. Raises ValueError, naming `where`,
    for what says no position, and for more than so many levels of lists and Excepts."""
    several = isinstance(positions, list | tuple)
    if levels < (1 if several else _depth(positions)):
        raise ValueError(f"{where} has more than {MAX_DEPTH} levels of lists and Excepts; flatten it")
    if several:
        return tuple(normal_positions(each, where, levels - 1) for each in positions)
    if isinstance(positions, bool) or not isinstance(positions, str | int | Span | After | Sinks | Except):
        raise ValueError(f"{where}={positions!r}: give positions, a Span, the name of a span, or a list of these")
    return positions


def _depth(positions: Any) -> int:
    if isinstance(positions, tuple):
        return 1 + max(map(_depth, positions), default=0)
    return 1 + _depth(positions.of) if isinstance(positions, Except) else 0


@dataclass(frozen=True)
class TokenLayout:
    """What is where in one sequence. prompt: its number of tokens. spans: intervals [start, stop) by name, one or
    several each, such as {"image": (4, 580)}, or a `NoPlace`. context: the layout of the sequence that a layer with a
    context attends to, whose keys are then meant. steps: the number of calls of a model that sees the whole sequence
    again in each, as in diffusion; None: step 0 is the prompt and step n the n-th generated token."""

    prompt: int
    spans: Mapping[str, Any] = field(default_factory=dict)
    context: "TokenLayout | None" = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if type(self.prompt) is not int or self.prompt < 1:
            raise ValueError(f"TokenLayout.prompt={self.prompt!r} must be the number of tokens, at least 1")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"TokenLayout.steps={self.steps!r} must be at least 1, or None where a step is a token")
        if not isinstance(self.spans, Mapping):
            raise ValueError(f"TokenLayout.spans={self.spans!r} must be a mapping of intervals by name")
        for name in self.spans:
            if not isinstance(name, str) or not name:
                raise ValueError(f"TokenLayout.spans: {name!r} is no name; give the span one, such as 'image'")
            if name in (ALL, GENERATED):
                raise ValueError(f"TokenLayout.spans: {name!r} has a meaning of its own; give the span another name")
            if not isinstance(self.spans[name], NoPlace):
                self.named(name, "TokenLayout.spans")

    @property
    def places(self) -> dict[str, tuple[Interval, ...]]:
        """The intervals of all names that have any."""
        known = sorted(name for name, given in self.spans.items() if not isinstance(given, NoPlace))
        return {name: self.named(name, "spans") for name in known}

    def named(self, name: str, where: str) -> tuple[Interval, ...]:
        """The intervals of a named span. Raises ValueError for an unknown name, or numbers outside of the prompt."""
        if name not in self.spans:
            known = suggest(name, [ALL, GENERATED, *self.places])
            ends = _edges(name)
            if ends is not None:
                start, stop = ends[0] or 0, "end" if ends[1] is None else ends[1]
                known = f"; the positions from one to another are Span({start}, {stop!r}), in JSON " + json.dumps(
                    {"span": [start, stop]}
                )
            raise ValueError(f"{where}: no span is called {name!r}{known}")
        given = self.spans[name]
        if isinstance(given, NoPlace):
            raise ValueError(f"{where}: the tokens of {name!r} are not known: {given.why}")
        if not isinstance(given, list | tuple):
            raise ValueError(f"TokenLayout.spans[{name!r}]={given!r}: give (start, stop) in tokens, or a list of these")
        if not given:
            raise ValueError(f"TokenLayout.spans[{name!r}] is empty: leave the name out")
        pieces = given if isinstance(given[0], list | tuple) else [given]
        for piece in pieces:
            pair = isinstance(piece, list | tuple) and [type(end) for end in piece] == [int, int]
            if not pair or not 0 <= piece[0] < piece[1] <= self.prompt:
                raise ValueError(
                    f"TokenLayout.spans[{name!r}]: {piece!r} must be [start, stop) within the {self.prompt} tokens"
                )
        return joined([(int(start), int(stop)) for start, stop in pieces])


@dataclass(frozen=True)
class Chosen:
    """Positions in `intervals` (disjoint and rising) and those that any of the `sinks` finds; negated: all others."""

    intervals: tuple[Interval, ...]
    sinks: tuple[Sinks, ...] = ()
    negated: bool = False

    @property
    def count(self) -> int:
        """Number of positions, of what no hidden state decides."""
        return sum(stop - start for start, stop in self.intervals)

    def within(self, first: int, last: int) -> "Chosen":
        """Without positions outside of [first, last)."""
        cut = [(max(start, first), min(stop, last)) for start, stop in self.intervals]
        return Chosen(tuple((a, b) for a, b in cut if a < b), self.sinks, self.negated)

    def also_in(self, other: "Chosen") -> "Chosen":
        """The positions that both have; neither may have sinks."""
        found = [piece for start, stop in other.intervals for piece in self.within(start, stop).intervals]
        return Chosen(joined(found))

    def holds(self, positions: Tensor) -> Tensor:
        """Which positions are among them, none of which is a sink; those below 0 are not."""
        held = torch.zeros_like(positions, dtype=torch.bool)
        for start, stop in self.intervals:
            held |= (positions >= start) & (positions < stop)
        return (held ^ self.negated) & (positions >= 0)

    def covers(self, first: int, last: int) -> bool:
        """Whether all positions from first to last are among them; there may be no sinks."""
        return any(start <= first and last < stop for start, stop in self.intervals)

    def rank(self, positions: Tensor) -> Tensor:
        """How many of them come before each position."""
        total = torch.zeros_like(positions)
        for start, stop in self.intervals:
            total += (positions - start).clamp(0, stop - start)
        return total

    def numbers(self) -> list[int]:
        """The positions in order."""
        return [position for start, stop in self.intervals for position in range(start, stop)]


def chosen(positions: Positions, layout: TokenLayout, total: int, where: str) -> Chosen:
    """The positions that words mean in a sequence that ends with `total` tokens. Raises ValueError, naming `where`, for
    an unknown name, numbers outside of the sequence, and for words that mean no position."""
    found = _chosen(positions, layout, total, where).within(0, FAR)
    kept = found if found.sinks else found.within(0, total)
    if not kept.intervals and not kept.sinks:
        raise ValueError(f"{where}={positions!r} selects nothing in a sequence of {total} tokens")
    return kept


def _chosen(positions: Positions, layout: TokenLayout, total: int, where: str) -> Chosen:
    if isinstance(positions, tuple):
        parts = [_chosen(each, layout, total, where) for each in positions]
        if len(parts) > 1 and any(part.negated for part in parts):
            raise ValueError(f"{where}: Except(Sinks(...)) joins no other positions; put all of them into the Except")
        if len(parts) == 1:
            return parts[0]
        pieces = [piece for part in parts for piece in part.intervals]
        return Chosen(joined(pieces), tuple(dict.fromkeys(s for part in parts for s in part.sinks)))
    if isinstance(positions, Sinks):
        return Chosen((), (positions,))
    if isinstance(positions, Except):
        inner = _chosen(positions.of, layout, total, where)
        if inner.sinks:
            return Chosen(inner.intervals, inner.sinks, not inner.negated)
        return Chosen(_complement(inner.intervals))
    return Chosen(_plain(positions, layout, total, where))


def _plain(positions: Any, layout: TokenLayout, total: int, where: str) -> tuple[Interval, ...]:
    prompt = layout.prompt
    if positions == ALL:
        return ((0, FAR),)
    if positions == GENERATED:
        return ((prompt, FAR),)
    if isinstance(positions, str):
        return layout.named(positions, where)
    if isinstance(positions, After):
        return ((layout.named(positions.name, where)[-1][1], FAR),)
    span = Span(positions) if type(positions) is int else positions
    if not isinstance(span, Span):
        raise ValueError(f"{where}={positions!r}: give positions, a Span, the name of a span, or a tuple of these")
    start = span.start if span.start >= 0 else prompt + span.start
    stop = prompt if span.stop == "end" else start + 1 if span.stop is None else span.stop
    stop = stop if stop >= 0 else prompt + stop
    if not 0 <= start < stop <= total:
        raise ValueError(
            f"{where}={positions!r} is [{start}, {stop}) with a prompt of {prompt} tokens; it must lie within the "
            f"sequence's {total} tokens and hold at least one"
        )
    return ((start, stop),)


def joined(pieces: Sequence[Interval]) -> tuple[Interval, ...]:
    """Sorted, overlapping and touching pieces in one."""
    out: list[Interval] = []
    for start, stop in sorted(pieces):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def _complement(pieces: tuple[Interval, ...]) -> tuple[Interval, ...]:
    edges = [0, *(edge for piece in pieces for edge in piece), FAR]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


Picks = str | int | range | Sequence[Any]
"""ALL, a number, a range, "4:8" (from 4, before 8; either side may be missing), or several of these."""


def normal_picks(picks: Picks, where: str) -> Any:
    """ALL, or a tuple of numbers and texts such as "4:8". Raises ValueError for anything else."""
    if picks == ALL:
        return ALL
    items = list(picks) if isinstance(picks, list | tuple | set) else [picks]
    out: list[int | str] = []
    for item in items:
        if isinstance(item, range) and item.step == 1:
            out.append(f"{item.start}:{item.stop}")
        elif type(item) is int or (isinstance(item, str) and _edges(item) is not None):
            out.append(item)
        else:
            raise ValueError(
                f'{where}={picks!r}: give {ALL!r}, whole numbers, ranges such as "4:8", or a list of these'
            )
    return tuple(out)


def _edges(text: str) -> tuple[int | None, int | None] | None:
    ends = re.fullmatch(r"(-?[0-9]{1,12})?:(-?[0-9]{1,12})?", text)
    if ends is None:
        return None
    first, last = (None if end is None else int(end) for end in ends.groups())
    return first, last


def picked(picks: Any, size: int, where: str) -> tuple[int, ...]:
    """The numbers below `size` that normal picks mean; those below 0 count from the end. Raises ValueError where they
    are none, or out of range."""
    if picks == ALL:
        return tuple(range(size))
    found: set[int] = set()
    for item in picks:
        first, last = _edges(item) or (0, 0) if isinstance(item, str) else (item, item + 1 if item != -1 else None)
        low = 0 if first is None else first if first >= 0 else first + size
        high = size if last is None else last if last >= 0 else last + size
        if not 0 <= low < size or high > size:
            raise ValueError(f"{where}={item!r} is out of range: there are {size}, numbered 0 to {size - 1}")
        if high <= low:
            raise ValueError(f"{where}={item!r} selects nothing of {size}")
        found.update(range(low, high))
    if not found:
        raise ValueError(f"{where}={picks!r} selects nothing of {size}")
    return tuple(sorted(found))


def check_rising(named: Any, edges: Callable[[Any], tuple[int, int]], where: str) -> None:
    """Raises ValueError unless what is named one after another rises, as the numbers that are put in its place are
    taken to do. edges: the first and the last number of one part."""
    before = -1
    for part in named if isinstance(named, tuple) else (named,):
        first, last = (0, 0) if part == ALL else edges(part)
        if first <= before:
            raise ValueError(f"{where}={named!r}: numbers are put in rising order; name them so, and each once")
        before = last


def picked_steps(picks: Any, layout: TokenLayout, where: str) -> tuple[tuple[Interval, ...], tuple[Interval, ...]]:
    """(positions whose step is picked, calls that are picked): a step is a token, or with `TokenLayout.steps` a
    call."""
    if picks == ALL:
        return ((0, FAR),), ((0, FAR),)
    if layout.steps is not None:
        return ((0, FAR),), joined([(step, step + 1) for step in picked(picks, layout.steps, where)])
    pieces: list[Interval] = []
    for item in picks:
        first, last = _edges(item) or (0, 0) if isinstance(item, str) else (item, item + 1)
        low, high = first or 0, FAR if last is None else last
        if low < 0 or high <= low:
            raise ValueError(f"{where}={item!r}: steps count from 0 (the prompt), and a range must hold one")
        pieces.append((0 if low == 0 else layout.prompt + low - 1, layout.prompt + high - 1))
    return joined(pieces), ((0, FAR),)
