"""Classes of keys: which positions are in which sets, and sums over the keys of each class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import is_
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.edits.spans import Chosen, Sinks
from attnzoo.attention.edits.weights import least_weight

T = TypeVar("T")


@lru_cache(maxsize=64)
def class_codes(sets: tuple[Chosen, ...], keys: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(codes of positions below `keys`, of all), whatever hidden states say: bit m of a class's code says whether its
    keys are in set m. What holds nothing (position -1) has code 0."""
    sinks = tuple(dict.fromkeys(each for held in sets for each in held.sinks))
    marks, negated = [_bits(sets, each) for each in sinks], _negated(sets)
    *held, (_, _, beyond) = _pieces(sets, keys)
    found = {code for _, _, code in held}
    for mark in marks:
        found |= {code | mark for code in found}
    inside = {code ^ negated for code in found}
    return tuple(sorted(inside)), tuple(sorted(inside | {0, beyond ^ negated}))


def _pieces(sets: tuple[Chosen, ...], keys: int) -> list[tuple[int, int, int]]:
    """(start, stop, code) of all positions from 0 to `keys`, which stands alone, by intervals alone: without sinks, and
    sets as if not negated."""
    turned = {0: 0, keys: 0}
    for bit, each in enumerate(sets):
        for edge in (edge for piece in each.intervals for edge in piece if edge <= keys):
            turned[edge] = turned.get(edge, 0) ^ 1 << bit
    code, starts, pieces = 0, sorted(turned), []
    for start, stop in zip(starts, [*starts[1:], keys + 1], strict=True):
        code ^= turned[start]
        pieces.append((start, stop, code))
    return pieces


def _bits(sets: tuple[Chosen, ...], sinks: Sinks) -> int:
    """The sets that these sinks are named in."""
    return sum(1 << bit for bit, each in enumerate(sets) if sinks in each.sinks)


def _negated(sets: tuple[Chosen, ...]) -> int:
    return sum(1 << bit for bit, each in enumerate(sets) if each.negated)


class KeySets:
    """Which positions of one sequence are in which sets of keys, and of which class they are: positions of one class
    are in the same sets. It is known from the first call on, but for sinks, which are marked as they are found.

    members: for each set, which classes are in it, [1, 1, C]. Positions stand in rows: -1 in the first, those of the
    `keys` keys of the sequence after it, and one for all beyond.
    """

    @torch.inference_mode(False)
    def __init__(self, sets: tuple[Chosen, ...], codes: tuple[int, ...], keys: int, device: torch.device) -> None:
        self.sets, self.keys, self.seen = sets, keys, 0
        self._codes, negated = codes, _negated(sets)
        self._class = {code: number for number, code in enumerate(codes)}  # codes may have more bits than an int64
        class_P = torch.full((keys + 2,), self._class[0])
        for start, stop, code in _pieces(sets, keys):
            class_P[start + 1 : stop + 1] = self._class[code ^ negated]
        self._class_P = class_P.to(device)
        self.members = class_members(sets, codes, device)
        self._made: dict[Any, Any] = {}
        self._joined: tuple[list[Tensor], Tensor] | None = None

    def observe(self, found: dict[Sinks, Tensor], first: int, tokens: int) -> None:
        """Marks the sinks among the next `tokens` tokens, from position `first` on: found_T (bool), left out where none
        is one. Raises ValueError where tokens before them have not been seen."""
        if self.seen != first:
            raise ValueError(
                f"{self.sinks[0]}: this run has seen the hidden states of {self.seen} tokens, and the next one is at "
                f"position {first}; a run with Sinks must see its sequence from the first token on, once"
            )
        self.seen = first + tokens
        for sinks, found_T in found.items():
            self._mark(sinks, found_T.nonzero()[:, 0] + first + 1)

    @property
    def sinks(self) -> tuple[Sinks, ...]:
        """What must be known of hidden states."""
        return tuple(dict.fromkeys(sinks for each in self.sets for sinks in each.sinks))

    def _mark(self, sinks: Sinks, rows: Tensor) -> None:
        rows = rows[rows <= self.keys]
        marks, negated = _bits(self.sets, sinks), _negated(self.sets)
        marked = [self._class.get((code ^ negated | marks) ^ negated, 0) for code in self._codes]
        self._class_P[rows] = torch.tensor(marked, device=rows.device)[self._class_P[rows]]
        self._made.clear()

    def classes(self, positions: Tensor) -> Tensor:
        """The class of the key at each position."""
        return self._class_P[positions.clamp(-1, self.keys) + 1]

    def holds(self, held: Chosen, positions: Tensor) -> Tensor:
        """Which positions are in one of the sets; those below 0 are not."""
        return self.members[held][0, 0][self.classes(positions)]

    @property
    def table(self) -> Tensor:
        """table_1CP: 1 where a row is of the class, else 0, in float32."""
        return self.made(
            "table",
            lambda: F.one_hot(self._class_P, len(self._codes)).t().to(torch.float32, copy=True)[None].contiguous(),
        )

    def rows(self, held: Chosen) -> Tensor:
        """rows_11P: which rows are in one of the sets."""
        return self.members[held][..., self._class_P]

    def made(self, name: Any, make: Callable[[], T]) -> T:
        """What is made of the classes of all rows, kept until another sink is found."""
        if name not in self._made:
            with torch.inference_mode(False):
                self._made[name] = make()
        found: T = self._made[name]
        return found

    def joined(self, tables: list[Tensor]) -> Tensor:
        """The tables [1, C, P] of rows of which this is the first as one, up to the shortest; kept from step to step
        until one of them is another."""
        if len(tables) == 1:
            return tables[0]
        if self._joined is None or len(self._joined[0]) != len(tables) or not all(map(is_, self._joined[0], tables)):
            shortest = min(each.shape[2] for each in tables)
            with torch.inference_mode(False):
                self._joined = tables, torch.cat([each[:, :, :shortest] for each in tables])
        return self._joined[1]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def class_members(sets: tuple[Chosen, ...], codes: tuple[int, ...], device: torch.device) -> dict[Chosen, Tensor]:
    """For each set, which classes are in it, [1, 1, C]. Layers share them."""
    members = torch.tensor([[code >> bit & 1 for code in codes] for bit in range(len(sets))], device=device).bool()
    return {held: members_C[None, None] for held, members_C in zip(sets, members, strict=True)}


def class_table(tables: list[Tensor], rows_BKS: Tensor | None, x_BNRS: Tensor, first: KeySets) -> Tensor:
    """in_class_LCS of the entries of a cache, of each row's kv heads, or of one for all: parts of tables [1, C, P] of
    each row, of which rows_BKS says where entries stand in them (`table_rows`). x_BNRS: what it is multiplied with, in
    which query heads that share a kv head follow each other. first: of the first row, which keeps what is joined."""
    if rows_BKS is None:
        return first.joined(tables)[:, :, 1 : x_BNRS.shape[3] + 1].to(x_BNRS.dtype)
    found = [
        each[0][:, rows_KS.clamp(max=each.shape[2] - 1)].transpose(0, 1)
        for each, rows_KS in zip(tables, rows_BKS.expand(len(tables), -1, -1), strict=True)
    ]
    return torch.cat(found).to(x_BNRS.dtype)


def of_classes(x_BNRX: Tensor, table_LXY: Tensor) -> Tensor:
    """x_BNRY: sums over the keys of each class, by a table's transpose, or what is said of each class, finite numbers,
    for each of its keys."""
    product = torch.bmm(x_BNRX.view(len(table_LXY), -1, x_BNRX.shape[3]), table_LXY)
    return product.view(*x_BNRX.shape[:3], -1)


def table_rows(positions_BKS: Tensor, keys: int) -> Tensor | None:
    """rows_BKS of entries in `KeySets` of at least so many keys; None: they are 1, 2, ... but for entries that hold
    nothing."""
    entries = positions_BKS.shape[-1]
    if positions_BKS.shape[1] == 1 and entries <= keys + 1:
        index_S = torch.arange(entries, device=positions_BKS.device)
        if bool(((positions_BKS == index_S) | (positions_BKS < 0)).all()):
            return None
    return positions_BKS.clamp(min=-1) + 1


@dataclass(frozen=True)
class MovedParts:
    """A move of weight between sets of keys, in products. table: rows [N, C, S] or [C, S] that sum up what is given,
    what those have that receive it, and what is lost; and of a filter, the weight of its keys, and by how much those of
    them that receive have more than the part that they need. least: what a row needs of these where anything moves."""

    table: Tensor
    least: Tensor
    infinite: Tensor

    def factors(self, sums_NRC: Tensor, named_NR1: Tensor | None, whole: bool = False) -> Tensor:
        """By how much the second and the third row of the table (`back`) change the weight of each key, for its weight;
        0 in rows where nothing moves. named_NR1: where it may, None: everywhere. whole: no row of weights has a sum
        above 1, so that `least` says all of what is no weight."""
        received_NR1 = sums_NRC[..., 1:2]
        still_NR1 = (sums_NRC < self.least).any(-1, keepdim=True)
        if not whole:
            still_NR1 = still_NR1 | (sums_NRC[..., :1] * least_weight(sums_NRC.dtype) > received_NR1)
        if named_NR1 is not None:
            still_NR1 = still_NR1 | ~named_NR1
        return sums_NRC[..., :2] / torch.where(still_NR1, self.infinite, received_NR1)

    @staticmethod
    def back(table: Tensor) -> Tensor:
        """The rows of a table that turn `factors` into the change of every key."""
        return table[..., 1:3, :]


def moved_parts(
    keys: Mapping[str, Tensor], of: str, numbers: tuple[float, float, float], dtype: torch.dtype
) -> MovedParts:
    """keys: sets of keys by name, of which "keys" give to "to", and a filter counts `of`; numbers: the share that is
    given, and the least weight and the least part of a filter, -inf and 0 without."""
    giving, to = keys["keys"], keys["to"]
    share, min_mass, min_share = numbers
    infinite = float("inf")
    receives, given, counted = (x.to(dtype) for x in (to & ~giving, giving, keys[of]))
    rows, needs = [share * given, receives, -share * given], [-infinite, least_weight(dtype), -infinite]
    if min_mass > -infinite:
        rows, needs = [*rows, counted, counted * receives - min_share * counted], [*needs, min_mass, 0.0]
    table = torch.cat(torch.broadcast_tensors(*rows), dim=-2)
    least = torch.tensor((*needs, infinite), dtype=dtype, device=table.device)
    return MovedParts(table[0] if len(table) == 1 else table, least[:-1], least[-1])


def moved_here(here: Any, *how: Any) -> MovedParts:
    """`moved_parts` of the sets of keys that an item means in a call."""
    return moved_parts(here.keys, *how)
