"""What a run reads, gathered over all calls of a sequence: the same whatever the chunks, and for every cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits.classes import KeySets, MovedParts
from attnzoo.attention.edits.items import Here, Move
from attnzoo.attention.edits.order import Weighed
from attnzoo.attention.edits.plan import EditPlan, LayerItems, Meant
from attnzoo.attention.edits.reads import Entropy, KeySums, Map, Mass, Read, TopKeys


@dataclass
class LayerRecord:
    """What one layer has read of one sequence so far, and what it must remember of it.

    parts: (query positions, values) of every call by the read's index; sums: likewise, summed. held: of the last call,
    positions_BKS of entries, the logarithms of how many tokens each stands for, None: each for itself, and the row.
    empty: (head, query) of rows in which nothing could be seen. engines: those that ran. uncounted: as in
    `AttentionCall`. reached: positions, or calls where steps are calls, that it has seen. layer: the id of the
    attention that is known to be the planned one.
    """

    plan: LayerItems
    parts: dict[int, list[tuple[Tensor, dict[str, Tensor]]]] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)
    held: tuple[Tensor, Tensor | None, int] | None = None
    empty: list[tuple[int, int]] = field(default_factory=list)
    engines: set[str] = field(default_factory=set)
    approximate: bool = False
    uncounted: bool = False
    heads: int = 0
    reached: int = 0
    layer: int | None = None
    _sets: KeySets | None = None

    def sets(self, device: torch.device) -> KeySets:
        """Which keys are meant."""
        if self._sets is None:
            self._sets = KeySets(self.plan.sets, self.plan.codes, self.plan.keys, device)
        return self._sets

    def moved(self, like: Tensor) -> MovedParts:
        """Of a `Move` that is all there is, what turns weights of all keys [., P], on their device and in their dtype,
        into those after it: [1, C, P]."""
        sets = self.sets(like.device)

        def make() -> MovedParts:
            (meant,) = self.plan.items
            assert isinstance(meant.item, Move)
            parts = meant.item.parts({name: sets.rows(held) for name, held in meant.sets}, like.dtype)
            return replace(parts, table=parts.table[None])

        return sets.made(like.dtype, make)

    def add(
        self, meant: Meant, values: dict[str, Tensor], heads: Tensor | slice, rows: Tensor | slice, queries_R: Tensor
    ) -> None:
        """Adds what one call says to a read: of its heads and queries among those of the call."""
        cut = {name: x[heads][:, rows] for name, x in values.items()}
        if isinstance(meant.item, KeySums):
            summed, before = cut["sums"].sum(1), self.sums.get(meant.index)
            self.sums[meant.index] = summed if before is None else before + summed
        else:
            self.parts.setdefault(meant.index, []).append((queries_R[rows], cut))


def read_values(meant: Meant, here: Here, found: Weighed) -> dict[str, Tensor]:
    """A read's values of every head and query of a call."""
    read, weights = meant.item, found.weights_NRS
    if isinstance(read, Mass):
        return masses(read, here, weights)
    chosen = here.keys["keys"]
    if isinstance(read, Entropy):
        weights = weights * chosen.to(weights.dtype)
        total = weights.sum(-1, keepdim=True)
        share = weights / torch.where(total == 0, 1.0, total)
        return {"entropy": _small(0.0 - torch.xlogy(share, share).sum(-1))}
    if isinstance(read, TopKeys):
        return _top(read.k, weights, chosen & (found.scores_NRS != float("-inf")), here)
    assert here.key_row_NS is not None
    count = dict(meant.sets)["keys"].count
    column_NRS = torch.where(chosen, here.key_row_NS[:, None], count).expand_as(weights)
    scores = isinstance(read, Map) and read.what == "scores"
    source = found.scores_NRS if scores else weights
    columns = source.new_full((*source.shape[:2], count + 1), float("-inf") if scores else 0.0)
    columns = columns.scatter(-1, column_NRS, source)[..., :-1]
    if isinstance(read, KeySums):
        return {"sums": _small(columns)}
    assert isinstance(read, Map)
    return {"map": columns.to(read.kept_in)}


def masses(read: Mass, here: Here, weights_NRS: Tensor) -> dict[str, Tensor]:
    """The weight of each of its sets, of keys or of classes of them."""
    return {name: _small((weights_NRS * here.keys[name]).sum(-1)) for name in read.key_sets()}


def _top(k: int, weights_NRS: Tensor, chosen: Tensor, here: Here) -> dict[str, Tensor]:
    """The largest weights and their positions, 0 and -1 where a query sees fewer keys."""
    assert here.positions_NS is not None
    seen = weights_NRS.masked_fill(~(chosen & here.visible_NRS), float("-inf"))
    largest, at = seen.topk(min(k, seen.shape[-1]), dim=-1)
    positions = here.positions_NS[:, None].expand(-1, seen.shape[1], -1).gather(-1, at)
    missing, nothing = k - largest.shape[-1], largest == float("-inf")
    pad = torch.nn.functional.pad
    return {
        "positions": pad(positions.masked_fill(nothing, -1), (0, missing), value=-1),
        "weights": _small(pad(largest.masked_fill(nothing, 0.0), (0, missing))),
    }


def _small(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.float()


@dataclass(frozen=True)
class ReadResult:
    """What one read found. values: by name, [heads, queries] and more axes: those of a Mass by its bins, "map",
    "positions" and "weights" of the top keys, "entropy"; "sums" [heads, keys]. queries_Q: the positions of the queries
    that were computed; keys_S: positions of the columns of a map or of sums."""

    read: Read
    heads: tuple[int, ...]
    queries_Q: Tensor
    keys_S: Tensor
    values: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.values.values())


@dataclass(frozen=True)
class LayerReading:
    """What was read of one layer. `map`, `mass`, `top`, `key_sums` and `entropy` are those of the first read of their
    kind; `results` has all in list order.

    engine: what computed it. positions_S: all positions up to the last one that the layer has seen.
    evicted [N, S] (bool): those that the cache holds no more, for every query head.
    stands_for_NS: how many tokens the entry at each position stands for in the cache now: 1 for itself, more where
    others were merged into it, 0 where it is gone; None where the cache merges tokens and does not count them.
    empty: (head, query) of rows in which nothing could be seen, whose output is zeros. approximate: scores are of keys
    that lack channels.
    """

    engine: str
    results: tuple[ReadResult, ...]
    positions_S: Tensor
    evicted: Tensor
    stands_for_NS: Tensor | None
    empty: tuple[tuple[int, int], ...]
    approximate: bool

    def __repr__(self) -> str:
        found = [
            f"{type(result.read).__name__}: "
            + ", ".join(f"{name} {list(x.shape)}" for name, x in result.values.items())
            for result in self.results
        ]
        return f"LayerReading({'; '.join(found)})"

    def first(self, kind: type[Read]) -> ReadResult:
        """The first result of this kind. Raises ValueError where nothing of the kind was asked for."""
        for result in self.results:
            if isinstance(result.read, kind):
                return result
        raise ValueError(f"no {kind.__name__} was asked for in this layer")

    def _read(self, kind: type[Read]) -> ReadResult:
        """As `first`. Raises ValueError, too, where none of its queries has been computed."""
        result = self.first(kind)
        if not result.values:
            raise ValueError(f"{kind.__name__} has no numbers: the text ended before any of the queries it asks for")
        return result

    @property
    def map(self) -> Tensor:
        return self._read(Map).values["map"]

    @property
    def mass(self) -> dict[str, Tensor]:
        return self._read(Mass).values

    @property
    def top(self) -> dict[str, Tensor]:
        return self._read(TopKeys).values

    @property
    def key_sums(self) -> Tensor:
        return self._read(KeySums).values["sums"]

    @property
    def entropy(self) -> Tensor:
        return self._read(Entropy).values["entropy"]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(result.nbytes for result in self.results)


class Reading:
    """What a run has read so far, by layer: reading[3].map. Layers of which nothing was asked, or that have not run,
    are not among them."""

    def __init__(self, plan: EditPlan, records: list[LayerRecord | None]) -> None:
        self._layers = {
            number: layer_reading(record)
            for number, record in enumerate(records)
            if record is not None and record.engines and any(isinstance(m.item, Read) for m in record.plan.items)
        }
        self.plan = plan

    def __getitem__(self, layer: int) -> LayerReading:
        if layer not in self._layers:
            raise ValueError(f"nothing was read of layer {layer}; there are {sorted(self._layers)}")
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Reading(layers={sorted(self._layers)}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all values of all layers."""
        return sum(layer.nbytes for layer in self._layers.values())


def layer_reading(record: LayerRecord) -> LayerReading:
    """The reading of one layer so far."""
    stands_for_NS = _stands_for(record)
    return LayerReading(
        "+".join(sorted(record.engines)),
        tuple(_result(record, meant) for meant in record.plan.items if isinstance(meant.item, Read)),
        torch.arange(stands_for_NS.shape[1]),
        stands_for_NS == 0,
        None if record.uncounted else stands_for_NS,
        tuple(record.empty),
        record.approximate,
    )


def _result(record: LayerRecord, meant: Meant) -> ReadResult:
    read: Any = meant.item
    parts = record.parts.get(meant.index, [])
    columns = torch.tensor(
        dict(meant.sets)["keys"].numbers() if isinstance(read, Map | KeySums) else [], dtype=torch.int64
    )
    if isinstance(read, KeySums):
        sums = record.sums.get(meant.index)
        values = {} if sums is None else {"sums": sums}
    else:
        values = {
            name: torch.cat([found[name] for _, found in parts], dim=1) for name in (parts[0][1] if parts else ())
        }
    queries = torch.cat([at for at, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    return ReadResult(read, meant.heads, queries, columns, values)


def _stands_for(record: LayerRecord) -> Tensor:
    if record.held is None:
        return torch.zeros(record.heads, 0)
    positions_BKS, log_counts_BKS, row = record.held
    positions_KS = positions_BKS[row]
    last = int(positions_KS.max()) + 1
    counts = torch.ones_like(positions_KS, dtype=torch.float32)
    if log_counts_BKS is not None:
        counts = log_counts_BKS[row].float().exp().round()
    kept = torch.zeros(len(positions_KS), last + 1)
    kept.scatter_(1, positions_KS.cpu().clamp(min=-1) + 1, counts.cpu().expand(len(positions_KS), -1))
    return kept[:, 1:].repeat_interleave(record.heads // len(kept), dim=0)
