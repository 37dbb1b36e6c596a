"""Reads and edits as JSON and back: [{"scale": {"where": {"heads": [3], "keys": "image"}, "factor": 1.5}}, ...].

Positions are "all", "generated", the name of a span, a number, {"span": [start, stop]}, {"after": name},
{"sinks": {"channels": [...], "tau": ...}}, {"except": positions}, or a list of these: [0, 3] are the positions 0 and 3,
{"span": [0, 3]} those from 0 to 2. What is left out has its default, where it has one, and a key that is not known is
refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from attnzoo.attention.edits import items as kinds
from attnzoo.attention.edits import reads
from attnzoo.attention.edits.items import HeadFilter, Item, Values, Where
from attnzoo.attention.edits.spans import After, Except, Sinks, Span
from attnzoo.errors import suggest

KINDS: dict[str, type[Item]] = {
    "add": kinds.Add,
    "hide": kinds.Hide,
    "temper": kinds.Temper,
    "put_scores": kinds.PutScores,
    "scale": kinds.Scale,
    "raise": kinds.Raise,
    "put_weights": kinds.PutWeights,
    "copy_head": kinds.CopyHead,
    "move": kinds.Move,
    "mass": reads.Mass,
    "top_keys": reads.TopKeys,
    "key_sums": reads.KeySums,
    "entropy": reads.Entropy,
    "map": reads.Map,
}
"""Every read and edit by its name in JSON."""
NAMES = {cls: name for name, cls in KINDS.items()}
POSITIONS = ("queries", "keys", "to", "of")
"""Fields that hold positions."""
MEANT = {
    "where": 'say what it changes, such as {"keys": "image"}; {} is everything',
    "value": "say what is added to the scores",
    "factor": "say by how much to multiply",
    "share": "say which part, from 0 to 1",
    "source": "say which head",
    "to": "say which keys receive",
    "scores": "give numbers [heads, queries, keys]",
    "weights": "give numbers [heads, queries, keys]",
}
"""What is said of a field that cannot be left out."""


def item_to_json(item: Item) -> dict[str, Any]:
    """{name: fields}, without fields that are as they are by default."""
    return {NAMES[type(item)]: _fields_to_json(item)}


def _fields_to_json(value: Any) -> dict[str, Any]:
    found = {each.name: (each, getattr(value, each.name)) for each in fields(value)}
    return {name: _to_json(name, given) for name, (each, given) in found.items() if given != _default(each)}


def _default(each: Field[Any]) -> Any:
    """What a field is if it is left out; MISSING if it cannot be."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def _to_json(name: str, value: Any) -> Any:
    if name == "bins":
        return {key: _positions_to_json(of) for key, of in value}
    if name in POSITIONS:
        return _positions_to_json(value)
    if isinstance(value, Where | HeadFilter):
        return _fields_to_json(value)
    if isinstance(value, Values):
        return value.values.tolist()
    return list(value) if isinstance(value, tuple) else value


def _positions_to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_positions_to_json(each) for each in value]
    if isinstance(value, Span):
        return {"span": [value.start] if value.stop is None else [value.start, value.stop]}
    if isinstance(value, After):
        return {"after": value.name}
    if isinstance(value, Sinks):
        return {"sinks": {"channels": list(value.channels), "tau": value.tau}}
    if isinstance(value, Except):
        return {"except": _positions_to_json(value.of)}
    return value


def item_from_json(data: Any, where: str) -> Item:
    """The read or edit. Raises ValueError that names the field."""
    example = (
        f'{{"{data}": {{...}}}}' if isinstance(data, str) and data in KINDS else '{"scale": {...}} or {"map": {...}}'
    )
    name, given = _single(data, where, f"such as {example}")
    if name not in KINDS:
        raise ValueError(f"{where}: unknown read or edit {name!r}{suggest(name, KINDS)}")
    item: Item = _fields_from_json(KINDS[name], given, f"{where}.{name}")
    return item


def _fields_from_json(cls: type, given: Any, where: str) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given!r} must be an object of fields")
    known = [each.name for each in fields(cls)]
    for key in given:
        if key not in known:
            inner = "where" in known and key in [each.name for each in fields(Where)]
            hint = f"; did you mean where.{key}?" if inner else suggest(str(key), known)
            raise ValueError(f"{where}: unknown field {key!r}{hint}")
    try:
        values = {key: _from_json(key, value, f"{where}.{key}") for key, value in given.items()}
        for each in fields(cls):
            if each.name not in given and _default(each) is MISSING:
                raise ValueError(f"{where}.{each.name} is missing: {MEANT[each.name]}")
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _from_json(name: str, value: Any, where: str) -> Any:
    if name == "where":
        return _fields_from_json(Where, value, where)
    if name == "only_heads":
        return None if value is None else _fields_from_json(HeadFilter, value, where)
    if name == "bins":
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where}={value!r} must be an object of positions by name")
        return tuple((key, _positions_from_json(of, f"{where}.{key}")) for key, of in value.items())
    return _positions_from_json(value, where) if name in POSITIONS else value


def _positions_from_json(value: Any, where: str) -> Any:
    if isinstance(value, str) or type(value) is int:
        return value
    if isinstance(value, Sequence):
        return tuple(_positions_from_json(each, where) for each in value)
    kind, given = _single(value, where, '"all", a name, a number, {"span": [3, 9]}, or a list of these')
    if kind == "span" and _is_span(given):
        return Span(*given)
    if kind == "after" and isinstance(given, str):
        return After(given)
    if kind == "sinks":
        if not isinstance(given, Mapping) or set(given) != {"channels", "tau"}:
            raise ValueError(f"{where}.sinks={given!r} must have channels and tau, and nothing else")
        return Sinks(tuple(given["channels"]), given["tau"])
    if kind == "except":
        return Except(_positions_from_json(given, f"{where}.except"))
    if kind == "span":
        raise ValueError(f'{where}={value!r} are no positions; give {{"span": [start]}} or {{"span": [start, stop]}}')
    known = ["span", "after", "sinks", "except"]
    raise ValueError(f"{where}={value!r} are no positions" + ("" if kind in known else suggest(kind, known)))


def _is_span(given: Any) -> bool:
    numbers = isinstance(given, Sequence) and 1 <= len(given) <= 2 and type(given[0]) is int
    return numbers and (len(given) == 1 or type(given[1]) is int or given[1] == "end")


def _single(data: Any, where: str, example: str) -> tuple[str, Any]:
    if not isinstance(data, Mapping) or len(data) != 1 or not isinstance(next(iter(data)), str):
        raise ValueError(f"{where}={data!r} must be an object with one name, {example}")
    return next(iter(data.items()))
