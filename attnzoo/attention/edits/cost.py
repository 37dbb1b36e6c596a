"""What reads and edits cost: operations, memory, and bytes that come back, exact."""

from dataclasses import dataclass
from typing import Any, Literal

from attnzoo.attention.edits.reads import Entropy, KeySums, Map, Mass, Read, TopKeys
from attnzoo.attention.edits.spans import joined
from attnzoo.attention.edits.traits import LayerSizes
from attnzoo.types import dtype_bytes

ROWS = 256
"""Queries that the fused operation takes at a time."""
BLOCK_BYTES = 16 << 20
"""Bytes of scores that are computed at once where every key has a score of its own."""


@dataclass(frozen=True)
class LayerCost:
    """engine: "off" where nothing is done; "partitioned": the fused operation once per class of keys; "dense": a score
    for every key. flops, peak_bytes: at most, beyond the unedited pass. returned_bytes: exact, where all tokens are
    generated."""

    engine: Literal["off", "partitioned", "dense"] = "off"
    flops: int = 0
    peak_bytes: int = 0
    returned_bytes: int = 0


@dataclass(frozen=True)
class EditCost:
    """The cost of a plan, layer by layer."""

    layers: tuple[LayerCost, ...]

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def peak_bytes(self) -> int:
        """One layer works at a time; what is returned stays."""
        return max((layer.peak_bytes for layer in self.layers), default=0) + self.returned_bytes

    @property
    def returned_bytes(self) -> int:
        return sum(layer.returned_bytes for layer in self.layers)


def layer_cost(layer: Any, size: LayerSizes, total: int, keys: int) -> LayerCost:
    """The cost of one layer's `LayerItems`, None: nothing to do."""
    if layer is None:
        return LayerCost()
    named = [
        (start, min(stop, total))
        for start, stop in joined([piece for each in layer.items for piece in each.queries.intervals])
    ]
    queries = sum(stop - start for start, stop in named)
    seen = sum((stop - start) * (start + stop + 1) // 2 for start, stop in named)
    pairs = queries * keys if size.context else seen
    heads = len(layer.heads)
    returned = sum(returned_bytes(each, keys) for each in layer.items)
    if layer.engine == "dense":
        rows = min(queries, rows_at_once(heads, keys))
        peak = 4 * rows * heads * keys * 4
    else:
        rows = min(queries, ROWS)
        peak = 4 * (rows * keys + 2 * rows * heads * size.head_dim * 4)
    return LayerCost(layer.engine, 4 * pairs * heads * size.head_dim, peak, returned)


def rows_at_once(heads: int, keys: int) -> int:
    """Queries whose scores take about BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // max(1, 4 * heads * keys))


def returned_bytes(meant: Any, keys: int) -> int:
    """Bytes of what one `Meant` item returns, 0 for an edit."""
    read = meant.item
    if not isinstance(read, Read):
        return 0
    heads, queries = len(meant.heads), meant.queries.count
    columns = dict(meant.sets)["keys"].count
    if isinstance(read, Mass):
        return heads * queries * len(read.key_sets()) * 4
    if isinstance(read, TopKeys):
        return heads * queries * read.k * (8 + 4)
    if isinstance(read, KeySums):
        return heads * columns * 4
    if isinstance(read, Entropy):
        return heads * queries * 4
    assert isinstance(read, Map)
    return heads * queries * columns * dtype_bytes(read.kept_in)
