"""What can be changed in attention (and in `reads.py`, read): one class each, frozen, comparable, writable as JSON.

An edit's `apply` is its formula. It sees scores or weights [N, R, S] of some heads N, queries R and keys S, and in
`Here` which of them are meant. Whatever it does, keys that the mask hides stay hidden: `order.weighed`, which applies
all edits, sees to it.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.attention.edits.classes import MovedParts, moved_here, moved_parts
from attnzoo.attention.edits.spans import ALL, Chosen, Picks, Positions, normal_picks, normal_positions
from attnzoo.attention.edits.weights import is_some, with_sums_of
from attnzoo.ops.common.step_inputs import Memo


@dataclass(frozen=True, kw_only=True)
class Where:
    """Layers, query heads, queries, keys and steps that a read or an edit speaks of; what is left out means all.

    layers, heads: 0 is the first, -1 the last. queries, keys: positions. steps: 0 is the prompt, n the n-th generated
    token; in a model that sees everything again in each call, such as in diffusion, the number of the call.
    """

    layers: Picks = ALL
    heads: Picks = ALL
    queries: Positions = ALL
    keys: Positions = ALL
    steps: Picks = ALL

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "steps"):
            object.__setattr__(self, name, normal_picks(getattr(self, name), f"Where.{name}"))
        for name in ("queries", "keys"):
            object.__setattr__(self, name, normal_positions(getattr(self, name), f"Where.{name}"))


class Values:
    """Numbers [heads, queries, keys] that an edit puts in place, in the order of what its `Where` names; one head
    stands for all. Compared and hashed by value."""

    def __init__(self, values: Any, name: str = "values") -> None:
        if isinstance(values, Tensor) and values.is_complex():
            raise ValueError(f"{name} are complex; give real numbers")
        try:
            self.values = torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"{name} must be numbers in nested lists of equal lengths, or a tensor") from None
        if self.values.dim() == 2:
            self.values = self.values[None]
        if self.values.dim() != 3 or not torch.isfinite(self.values).all():
            raise ValueError(f"{name} of shape {list(self.values.shape)} must be finite numbers [heads, queries, keys]")

    @classmethod
    def of(cls, given: Any, name: str) -> "Values":
        return given if isinstance(given, Values) else cls(given, name)

    @property
    def largest(self) -> float:
        """The number of the largest magnitude."""
        return float(self.values.abs().max()) if self.values.numel() else 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash(self.values.numpy().tobytes())

    def __repr__(self) -> str:
        return f"Values({list(self.values.shape)})"


@dataclass(frozen=True)
class Here(Memo):
    """Which of the heads N, queries R and keys S of a call an item means.

    named_NR1: its heads and queries. visible_NRS: what the mask shows, of one head or query for all. keys: its sets of
    keys by name, [N or 1, 1, S]; "keys" is that of its `Where`. heads_N: the heads' numbers in the model, and
    positions_NS: logical positions of the keys; None where keys are classes of keys. head_row_N, query_row_R: their
    places among those that the item names; key_row_NS likewise; None for items that are not `placed`. everywhere: it is
    known to name all heads and queries.
    """

    named_NR1: Tensor
    visible_NRS: Tensor
    keys: dict[str, Tensor]
    heads_N: Tensor | None = None
    head_row_N: Tensor | None = None
    query_row_R: Tensor | None = None
    key_row_NS: Tensor | None = None
    positions_NS: Tensor | None = None
    everywhere: bool = False

    @property
    def meant(self) -> Tensor:
        """meant_NRS: the pairs that the item speaks of and the mask shows."""
        return self.named_NR1 & self.keys["keys"] & self.visible_NRS

    def place(self, values: Tensor) -> Tensor:
        """values [heads, queries, keys] of the named ones as [N, R, S], anything elsewhere."""
        assert self.head_row_N is not None
        assert self.query_row_R is not None
        assert self.key_row_NS is not None
        heads, queries, keys = values.shape
        rows = self.head_row_N.clamp(0, heads - 1)[:, None, None]
        return values[
            rows,
            self.query_row_R.clamp(0, queries - 1)[None, :, None],
            self.key_row_NS.clamp(0, keys - 1)[:, None],
        ]


@dataclass(frozen=True)
class Item:
    """A read or an edit. dense: it needs every key's score or weight; else sums over sets of keys are enough. placed:
    it needs the places of heads, queries and keys among those that it names."""

    where: Where
    dense: ClassVar[bool] = True
    placed: ClassVar[bool] = False

    def key_sets(self) -> dict[str, Positions]:
        """The sets of keys that it tells apart, by name."""
        return {"keys": self.where.keys}

    def check(self, heads: int, queries: Chosen, keys: Chosen, num_heads: int, at: str) -> None:
        """Raises ValueError where it does not fit what its `Where` names, of a layer of `num_heads` heads."""


class Edit(Item, ABC):
    """A change of scores or weights. All that says what changes is given: an edit without its number is a mistake, and
    not an edit that changes nothing. factors: its fields that scores or weights are multiplied by, moved by or set
    to."""

    factors: ClassVar[tuple[str, ...]] = ()

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, whatever the scores."""
        return False

    @abstractmethod
    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        """The changed scores or weights; where nothing is meant, the given ones."""


class ScoreEdit(Edit):
    """A change before the softmax."""


class WeightEdit(Edit):
    """A change after the softmax."""


@dataclass(frozen=True)
class Add(ScoreEdit):
    """score + value. From 10,000 on scores in float32 lose digits, and beyond 80,000 (4e13 in float64) the value is
    refused: `Hide` is what takes all weight from keys."""

    factors: ClassVar[tuple[str, ...]] = ("value",)
    value: float
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("Add.value", self.value)

    @property
    def idle(self) -> bool:
        return self.value == 0

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        return torch.where(here.meant, x_NRS + self.value, x_NRS)


@dataclass(frozen=True)
class Hide(ScoreEdit):
    """The keys get no weight at all."""

    dense: ClassVar[bool] = False

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        return x_NRS.masked_fill(here.meant, float("-inf"))


@dataclass(frozen=True)
class Temper(ScoreEdit):
    """score * factor; with `magnitude`, score + (factor - 1) |score|, which a factor above 1 raises whatever its
    sign."""

    factors: ClassVar[tuple[str, ...]] = ("factor",)
    factor: float
    magnitude: bool = False

    def __post_init__(self) -> None:
        _number("Temper.factor", self.factor)
        _flag("Temper.magnitude", self.magnitude)

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        finite = torch.where(x_NRS.isfinite(), x_NRS, 0.0)  # what an edit has hidden has no score
        added = finite.abs() if self.magnitude else finite
        return torch.where(here.meant, x_NRS + (self.factor - 1) * added, x_NRS)


@dataclass(frozen=True)
class PutScores(ScoreEdit):
    """The given scores, [heads, queries, keys] of what `where` names."""

    factors: ClassVar[tuple[str, ...]] = ("scores",)
    placed: ClassVar[bool] = True
    scores: Values

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", Values.of(self.scores, "PutScores.scores"))

    def check(self, heads: int, queries: Chosen, keys: Chosen, num_heads: int, at: str) -> None:
        _check_shape(f"{at}.scores", self.scores, heads, queries, keys)

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        return torch.where(here.meant, here.place(self.scores.values.to(x_NRS)), x_NRS)


@dataclass(frozen=True)
class Scale(WeightEdit):
    """weight * factor; with `renormalise`, every row that is named keeps the sum it had, but for one that has no weight
    left (see `Raise`): a factor of 0 for all that it sees leaves 0."""

    factors: ClassVar[tuple[str, ...]] = ("factor",)
    factor: float
    renormalise: bool = True
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("Scale.factor", self.factor, least=0.0)
        _flag("Scale.renormalise", self.renormalise)

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        scaled = torch.where(here.meant, x_NRS * self.factor, x_NRS)
        return with_sums_of(x_NRS, scaled, here.named_NR1) if self.renormalise else scaled


@dataclass(frozen=True)
class Raise(WeightEdit):
    """Where the keys have less than `share` of a row's weight (and some), as if the logarithm of share over theirs were
    added to their scores (Venkateswaran and Contractor 2025, arXiv 2505.12025). Less than 1e-34 of a row in float32,
    1e-304 in float64, is no weight, here and wherever edits divide by it: such a row stays as it is."""

    share: float
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("Raise.share", self.share, least=0.0, most=1.0)

    @property
    def idle(self) -> bool:
        return self.share == 0

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        theirs_NR1, total_NR1 = (x_NRS * here.meant).sum(-1, keepdim=True), x_NRS.sum(-1, keepdim=True)
        had = theirs_NR1 / torch.where(total_NR1 == 0, 1.0, total_NR1)
        low_NR1 = here.named_NR1 & is_some(theirs_NR1, total_NR1) & (had > 0) & (had < self.share)
        raised = torch.where(low_NR1 & here.meant, x_NRS * (self.share / torch.where(low_NR1, had, 1.0)), x_NRS)
        return with_sums_of(x_NRS, raised, low_NR1)


@dataclass(frozen=True)
class PutWeights(WeightEdit):
    """The given weights, [heads, queries, keys] of what `where` names; with `renormalise`, every row keeps its sum."""

    factors: ClassVar[tuple[str, ...]] = ("weights",)
    placed: ClassVar[bool] = True
    weights: Values
    renormalise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", Values.of(self.weights, "PutWeights.weights"))
        _flag("PutWeights.renormalise", self.renormalise)
        if bool((self.weights.values < 0).any()):
            raise ValueError("PutWeights.weights has numbers below 0; attention weights are at least 0")

    def check(self, heads: int, queries: Chosen, keys: Chosen, num_heads: int, at: str) -> None:
        _check_shape(f"{at}.weights", self.weights, heads, queries, keys)

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        put = torch.where(here.meant, here.place(self.weights.values.to(x_NRS)), x_NRS)
        return with_sums_of(x_NRS, put, here.named_NR1) if self.renormalise else put


@dataclass(frozen=True)
class CopyHead(WeightEdit):
    """The weights of the head `source` at the same positions, as they are at this place of the list."""

    source: int

    def check(self, heads: int, queries: Chosen, keys: Chosen, num_heads: int, at: str) -> None:
        if type(self.source) is not int or not 0 <= self.source < num_heads:
            raise ValueError(f"{at}.source={self.source!r} must be the number of a head, 0 to {num_heads - 1}")

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        assert here.positions_NS is not None
        assert here.heads_N is not None
        row = int((here.heads_N == self.source).nonzero())
        # By position: under a cache that evicts, each head may hold others.
        positions_NS = here.positions_NS.clamp(min=-1) + 1
        by_position = x_NRS.new_zeros(x_NRS.shape[1], int(positions_NS.max()) + 1)
        by_position = by_position.index_add(1, positions_NS[row], x_NRS[row])
        copied = by_position.t()[positions_NS].transpose(1, 2)
        return torch.where(here.meant, copied, x_NRS)


@dataclass(frozen=True, kw_only=True)
class HeadFilter:
    """Heads and queries whose weight on the keys `of` is at least `min_mass`, and of which the keys that receive have
    at least the part `min_share`, both but for rounding (256 units of it)."""

    of: Positions = ALL
    min_mass: float = 0.0
    min_share: float = 0.0

    def __post_init__(self) -> None:
        _number("HeadFilter.min_mass", self.min_mass, least=0.0)
        _number("HeadFilter.min_share", self.min_share, least=0.0, most=1.0)
        object.__setattr__(self, "of", normal_positions(self.of, "HeadFilter.of"))


@dataclass(frozen=True)
class Move(WeightEdit):
    """Takes `share` of the weight of the keys and gives it to the keys `to`, each in proportion to the weight it has;
    keys in both give. Nothing moves in a row where `to` has no weight (see `Raise`), or which `only_heads` leaves
    out."""

    to: Positions
    share: float
    only_heads: HeadFilter | None = None
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _number("Move.share", self.share, least=0.0, most=1.0)
        if not isinstance(self.only_heads, HeadFilter | None):
            raise ValueError(f"Move.only_heads={self.only_heads!r} must be a HeadFilter(...) or None")
        object.__setattr__(self, "to", normal_positions(self.to, "Move.to"))

    @property
    def idle(self) -> bool:
        return self.share == 0

    def key_sets(self) -> dict[str, Positions]:
        sets = {"keys": self.where.keys, "to": self.to}
        return sets if self.only_heads is None else sets | {"of": self.only_heads.of}

    def parts(self, keys: Mapping[str, Tensor], dtype: torch.dtype) -> MovedParts:
        """The move as products, for its sets of keys by name."""
        return moved_parts(keys, *self._how(dtype))

    def _how(self, dtype: torch.dtype) -> tuple[str, tuple[float, float, float], torch.dtype]:
        only = self.only_heads
        near = 1 - 256 * torch.finfo(dtype).eps  # sums of weights in another order are as large
        needs = (-float("inf"), 0.0) if only is None else (only.min_mass * near, only.min_share * near)
        return "to" if only is None else "of", (self.share, *needs), dtype

    def apply(self, x_NRS: Tensor, here: Here) -> Tensor:
        parts = here.once(moved_here, *self._how(x_NRS.dtype))
        factors = parts.factors(x_NRS @ parts.table.mT, None if here.everywhere else here.named_NR1)
        return torch.addcmul(x_NRS, x_NRS, factors @ parts.back(parts.table))


def _number(name: str, value: Any, least: float = -float("inf"), most: float = float("inf")) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if right and sys.float_info.max < abs(value) < float("inf"):
        raise ValueError(f"{name} is a whole number beyond 1e308; it must be a finite number")
    if not right or not abs(value) < float("inf") or not least <= value <= most:
        bounds = f" of at least {least}" + ("" if most > 1 else f" and at most {most}")
        bounds = bounds if least > -float("inf") else ""
        raise ValueError(f"{name}={value!r} must be a finite number{bounds}")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false")


def _check_shape(name: str, values: Values, heads: int, queries: Chosen, keys: Chosen) -> None:
    found, expected = list(values.values.shape), [heads, queries.count, keys.count]
    if keys.sinks or queries.sinks:
        raise ValueError(f"{name}: numbers for each key need keys and queries that are known before, not Sinks")
    if found[0] not in (1, heads) or found[1:] != expected[1:]:
        raise ValueError(f"{name} has shape {found}; `where` names {expected} [heads, queries, keys]")
