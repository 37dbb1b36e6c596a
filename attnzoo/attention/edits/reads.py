"""What can be read of attention: one class each, frozen, comparable, and writable as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from attnzoo.attention.edits.items import Item, Where
from attnzoo.attention.edits.spans import ALL, Positions, normal_positions
from attnzoo.types import DTYPES


@dataclass(frozen=True)
class Read(Item):
    """What is wanted to know of attention weights after all edits; without `where`, of all."""

    where: Where = field(default_factory=Where)


@dataclass(frozen=True)
class Mass(Read):
    """The weight of sets of keys, by name, for every head and query; without `bins`, of the keys of `where`, which has
    none beside them."""

    bins: Mapping[str, Positions] | tuple[tuple[str, Positions], ...] = ()
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        bins = self.bins.items() if isinstance(self.bins, Mapping) else self.bins
        if bins and self.where.keys != ALL:
            raise ValueError("Mass: where.keys and bins both name keys; leave where.keys out")
        for name, _ in bins:
            if not isinstance(name, str) or not name:
                raise ValueError(f"Mass.bins: {name!r} is no name; give each set of keys one, such as {{'image': ...}}")
        named = tuple((name, normal_positions(of, f"Mass.bins[{name!r}]")) for name, of in bins)
        object.__setattr__(self, "bins", named)

    def key_sets(self) -> dict[str, Positions]:
        return dict(self.bins) if self.bins else {"keys": self.where.keys}


@dataclass(frozen=True)
class TopKeys(Read):
    """The `k` keys of largest weight, their positions and weights, for every head and query."""

    k: int = 1

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"TopKeys.k={self.k!r} must be a whole number of at least 1")


@dataclass(frozen=True)
class KeySums(Read):
    """The weight of every key, summed over the queries, for every head."""

    placed: ClassVar[bool] = True


@dataclass(frozen=True)
class Entropy(Read):
    """The entropy in nats of each head's and query's weights over the keys, divided by their sum."""


@dataclass(frozen=True)
class Map(Read):
    """Every weight, or every score before the softmax (after its edits), for every head, query and key. dtype: None is
    fp16 for weights and fp32 for scores, which may lie beyond what fp16 holds."""

    placed: ClassVar[bool] = True
    what: Literal["weights", "scores"] = "weights"
    dtype: Literal["fp16", "fp32", "fp64"] | None = None

    def __post_init__(self) -> None:
        if self.what not in ("weights", "scores"):
            raise ValueError(f"Map.what={self.what!r} must be 'weights' or 'scores'")
        if self.dtype not in (None, "fp16", "fp32", "fp64"):
            raise ValueError(f"Map.dtype={self.dtype!r} must be 'fp16', 'fp32', 'fp64' or left out")
        if self.what == "scores" and self.dtype == "fp16":
            raise ValueError("Map.dtype='fp16' holds no scores beyond 65504: read scores in fp32, or leave dtype out")

    @property
    def kept_in(self) -> torch.dtype:
        """The dtype of what is returned."""
        return DTYPES[self.dtype or ("fp32" if self.what == "scores" else "fp16")]
