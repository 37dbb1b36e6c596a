"""Writes what the choices of an answer have read of attention: reductions as JSON, maps as files for a download."""

import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnzoo.attention.edits import (
    Edit,
    EditPlan,
    EditRun,
    Entropy,
    KeySums,
    LayerReading,
    Map,
    Mass,
    ReadResult,
    TopKeys,
)
from attnzoo.attention.edits.cost import returned_bytes
from attnzoo.attention.edits.plan import Meant
from attnzoo.attention.edits.reads import Read
from attnzoo.attention.edits.wire import NAMES
from serve.maps import MapStore, Room
from serve.openai.encoding import in_thread
from serve.openai.redistribution import Redistributed
from serve.request import Delta

INLINE_BYTES = 64 << 10
"""Most bytes of a choice's reductions in an answer."""
HEADER_BYTES = 128
"""Bytes before the numbers of a .npy file of three axes."""
NUMBER, POSITION, OBJECT = 20, 8, 256
"""Most characters of a number, of a position, and of the names in an object."""
PATH = "/v1/attention"


@dataclass
class Found:
    """What one choice has read: the JSON object of the answer, and the files that its maps become."""

    reply: dict[str, Any]
    files: list[tuple[dict[str, Any], bytes]]


class Readings:
    """The plans of an answer's choices, and what they have read, choice by choice. room: of their maps in `maps`.
    asked: whether the request has the field `attention`. redistributed: what its `redistribution` edits, whose reads
    come before those of `attention`."""

    def __init__(
        self,
        plans: list[EditPlan],
        room: Room,
        maps: MapStore,
        asked: bool = True,
        redistributed: Redistributed | None = None,
    ) -> None:
        self.plans, self.room, self._maps = plans, room, maps
        self._asked, self._redistributed = asked, redistributed
        self._replies: dict[str, dict[str, Any]] = {}

    async def take(self, news: Sequence[Delta]) -> None:
        """Writes what choices that have ended have read; `reply` has it afterwards."""
        for delta in news:
            if delta.run is not None:
                run, delta.run = delta.run, None
                given = self._redistributed
                found = await in_thread(0, written, run, 0 if given is None else len(given.reads))
                for entry, data in found.files:
                    name = self.room.put(data)
                    self._maps.sweep_later()
                    expires = int(time.time() + self._maps.ttl_s)
                    entry |= {"id": name, "url": f"{PATH}/{name}", "expires_at": expires}
                reply = {"attention": found.reply} if self._asked else {}
                if given is not None:
                    reply["redistribution"] = await in_thread(0, given.reply, run)
                self._replies[delta.request_id] = reply

    def reply(self, request_id: str) -> dict[str, Any]:
        """The fields that a choice that has ended has beside its text."""
        return self._replies.pop(request_id)


def _first(plan: EditPlan, own: int) -> int:
    """The index of the first read that the client has asked for."""
    items = plan.edits.items
    return own + next((at for at, item in enumerate(items) if not isinstance(item, Edit)), len(items))


def _reads(plan: EditPlan, own: int) -> Iterator[tuple[int, Meant]]:
    """(layer, read) of all reads but the first `own` ones of the list."""
    first = _first(plan, own)
    for number, layer in enumerate(plan.layers):
        for meant in () if layer is None else layer.items:
            if isinstance(meant.item, Read) and meant.index >= first:
                yield number, meant


def map_bytes(plan: EditPlan) -> int:
    """Bytes of the files of all maps, at most."""
    maps = [(layer, meant) for layer, meant in _reads(plan, 0) if isinstance(meant.item, Map)]
    return sum(HEADER_BYTES + returned_bytes(meant, plan.keys(plan.sizes[layer])) for layer, meant in maps)


def inline_bytes(plan: EditPlan, own: int = 0) -> int:
    """Bytes of the object `attention` of a choice, at most. own: of the reads, the first ones that are not in it."""
    layers = {layer for layer, _ in _reads(plan, own)}
    total = sum(OBJECT + 2 * POSITION * plan.sizes[layer].num_heads for layer in layers)
    for _, meant in _reads(plan, own):
        read, heads, queries = meant.item, len(meant.heads), meant.queries.count
        keys = dict(meant.sets)["keys"]
        intervals = len(meant.queries.intervals) + len(keys.intervals)
        total += 2 * OBJECT + POSITION * heads + 2 * (POSITION + 2) * intervals
        if isinstance(read, Mass):
            names = read.key_sets()
            total += sum(6 * len(name) + 8 for name in names) + NUMBER * heads * queries * len(names)
        elif isinstance(read, TopKeys):
            total += (NUMBER + POSITION + 4) * heads * queries * read.k
        elif isinstance(read, KeySums):
            total += NUMBER * heads * keys.count
        elif isinstance(read, Entropy):
            total += NUMBER * heads * queries
    return total


def written(run: EditRun, own: int = 0) -> Found:
    """What a run that has ended has read, but for its first `own` reads."""
    reading, found = run.reading, Found({"layers": [], "read": []}, [])
    first, asked = _first(run.plan, own), list(_reads(run.plan, own))
    results: dict[int, Iterator[ReadResult]] = {}
    for number in (number for number in reading if any(number == layer for layer, _ in asked)):
        found.reply["layers"].append(_layer(number, reading[number]))
        kept = sum(layer == number for layer, _ in asked)
        results[number] = iter(reading[number].results[-kept:])
    for number, meant in asked:
        entry = {
            "read": meant.index - first,
            "kind": NAMES[type(meant.item)],
            "layer": number,
            "heads": list(meant.heads),
        }
        result = next(results[number]) if number in results else None  # a text may end before the queries of a read
        found.reply["read"].append(entry | _numbers(result))
        if result is not None and "map" in result.values:
            values = result.values["map"].cpu().contiguous().numpy()
            data = io.BytesIO()
            np.save(data, values)
            entry = {"shape": list(values.shape), "dtype": str(values.dtype), "bytes": data.tell()}
            found.reply["read"][-1]["map"] = entry
            found.files.append((entry, data.getvalue()))
    found.reply["read"].sort(key=lambda entry: (entry["read"], entry["layer"]))
    return found


def _layer(number: int, layer: LayerReading) -> dict[str, Any]:
    """How a layer was read. evicted, merged: by head, positions that the cache has given up, and entries that stand for
    several tokens, None where the cache does not count them."""
    counts_NS = layer.stands_for_NS
    return {
        "layer": number,
        "engine": layer.engine,
        "approximate": layer.approximate,
        "empty_rows": len(layer.empty),
        "evicted": layer.evicted.sum(1).tolist(),
        "merged": None if counts_NS is None else (counts_NS > 1).sum(1).tolist(),
    }


def _numbers(result: ReadResult | None) -> dict[str, Any]:
    if result is None:
        return {"queries": [], "keys": None, "values": {}, "map": None}
    is_map = isinstance(result.read, Map)
    return {
        "queries": _intervals(result.queries_Q.tolist()),
        "keys": _intervals(result.keys_S.tolist()) if isinstance(result.read, Map | KeySums) else None,
        "values": {} if is_map else {name: _plain(x) for name, x in result.values.items()},
        "map": None,
    }


def _intervals(positions: Sequence[int]) -> list[list[int]]:
    """Rising positions as [start, stop)."""
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1][1] = position + 1
        else:
            found.append([position, position + 1])
    return found


def _plain(x: torch.Tensor) -> Any:
    """Nested lists of numbers of six digits; None for what is no number in JSON."""
    return _short(x.cpu().tolist())


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(each) for each in value]
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
