"""What an error about a configuration key suggests: the same key in its own section, or the type that it must have."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from attnzoo.attention import variant
from attnzoo.types import checked, field_types
from train.config import Config

UNKNOWN = re.compile(r"unknown key (?P<key>[\w.]+)(?P<hint>; did you mean [^?]*\?|;)")
"""How an error about an unknown key begins."""


def with_section(message: str, values: Mapping[str, Any]) -> str:
    """The message, which suggests the key of that name in another section if it is about an unknown key and there is
    one. values: the configuration as far as it is read.

    >>> with_section("unknown key steps; known: data, train", {"train": {"steps": 1}})
    'unknown key steps; did you mean train.steps? known: data, train'
    """
    found = UNKNOWN.search(message)
    if found is None:
        return message
    key = found["key"]
    others = {name: shown for name, shown in _keys(values) if name != key}
    last = {name: name.rpartition(".")[2] for name in others}
    name = key.rpartition(".")[2]
    near = [name] if found["hint"] != ";" else [name, *get_close_matches(name, last.values(), n=1, cutoff=0.75)]
    for word in near:
        same = [others[each].format(value=_value(values, key)) for each in others if last[each] == word]
        if same:
            *some, final = sorted(same)
            text = f"{', '.join(some)} or {final}" if some else final
            return f"{message[: found.start('hint')]}; did you mean {text}?{message[found.end('hint') :]}"
    return message


def _value(values: Mapping[str, Any], key: str) -> Any:
    """The value of an unknown key of a free section; "..." for others, which no configuration holds."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part, "...") if isinstance(found, Mapping) else "..."
    return found


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, how to write it) of every key that there is, the options of the chosen variants included."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        yield name, name
        if name == "model.attention":
            yield from _options(value)
        elif isinstance(value, Mapping):
            yield from _keys(value, f"{name}.")


def _options(spec: Any) -> Iterator[tuple[str, str]]:
    """The options of model.attention. They can be set one by one only where it is a mapping."""
    if isinstance(spec, list):  # which of the variants is meant?
        return
    kind = spec.get("kind") if isinstance(spec, Mapping) else spec
    try:
        names = [field.name for field in fields(variant(str(kind)).Config)]
    except ValueError:
        return
    for name in names:
        key = f"model.attention.{name}"
        whole = f"model.attention={{{{kind: {kind}, {name}: {{value}}}}}}"
        yield key, key if isinstance(spec, Mapping) else whole


def type_problem(key: str, values: Mapping[str, Any], otherwise: str) -> str:
    """What is wrong with the type of the value at a dotted key, in the words of every other configuration; `otherwise`
    if its type is right or not known."""
    *sections, name = key.split(".")
    try:
        cls = functools.reduce(lambda cls, part: field_types(cls)[part], sections, Config)
        value = functools.reduce(lambda found, part: found[part], key.split("."), values)
        if not is_dataclass(cls):
            return otherwise
        checked(value, field_types(cls)[name], key)
    except (KeyError, TypeError):
        return otherwise
    except ValueError as error:
        return str(error)
    return otherwise
