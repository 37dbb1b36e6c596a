"""Reads a configuration from YAML files with `base:` inheritance and `key=value` overrides into `train.config.Config`.

Every error names the key, the nearest known key, and the place (file:line or the command line).
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attnzoo.errors import suggest
from train.config import FREE_SECTIONS, Config
from train.config_hints import type_problem, with_section
from train.config_layers import ConfigError, ConfigLayer, place_of, read_layers
from train.limits import problems
from train.tasks import task_class


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a file (a bare name is looked up in configs/), its bases, and `key=value` overrides.

    Raises ConfigError for unknown keys, wrong types, values out of range, and files that cannot be read.
    """
    places: dict[str, str] = {}
    merged = OmegaConf.structured(Config)
    for layer in read_layers(name, overrides):
        places.update(layer.places)
        _check_keys(layer, merged)
        _merge(merged, layer)
    config = _resolved(merged, places)
    for key, problem in problems(config):
        raise ConfigError(f"{place_of(places, key)}: {problem}")
    _check_sections(config, places)
    return config


def _resolved(merged: Any, places: dict[str, str]) -> Config:
    """The typed configuration, with ${references} to other keys filled in."""
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(f"{place_of(places, key)}: {key}: {str(error).splitlines()[0]}") from None


EXAMPLES = {
    "task": "task.kind=language",
    "model": "model.num_layers=4",
    "data": "data.source=text.txt",
    "tokenizer": "tokenizer.vocab_size=2048",
}
"""A key of each section whose keys depend on the task."""


def _check_keys(layer: ConfigLayer, merged: Any) -> None:
    """Raises ConfigError for an unknown key. merged: the layers below, whose keys it may suggest."""
    for prefix, values, known in _sections(layer.values):
        if values is None:
            continue
        if not isinstance(values, Mapping):
            way = (
                f"a section with the keys {', '.join(known)}" if known else f"a section, for example {EXAMPLES[prefix]}"
            )
            raise ConfigError(f"{place_of(layer.places, prefix)}: {prefix}={values!r} must be {way}")
        for key in values:
            if known and key not in known:
                name = f"{prefix}.{key}" if prefix else str(key)
                problem = with_section(f"unknown key {name}{suggest(str(key), known)}", _plain(merged))
                raise ConfigError(f"{place_of(layer.places, name)}: {problem}")


def _plain(merged: Any) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def _sections(values: dict[str, Any]) -> Iterator[tuple[str, Any, list[str]]]:
    yield "", values, [f.name for f in fields(Config)]
    for section in fields(Config):
        if section.name in values and is_dataclass(section.type):
            yield section.name, values[section.name], [f.name for f in fields(section.type)]
        elif section.name in values and section.name in FREE_SECTIONS:
            yield section.name, values[section.name], []


def _merge(config: Any, layer: ConfigLayer) -> None:
    """Puts the layer's values into the configuration, in place: a copy a layer would be most of the time of reading."""
    attention = (layer.values.get("model") or {}).get("attention")
    known = config.model.get("attention")
    if isinstance(attention, dict) and "kind" not in attention and known is not None:
        if not OmegaConf.is_dict(known):
            raise ConfigError(
                f"{place_of(layer.places, 'model.attention')}: model.attention is {known!r}, so its options cannot be "
                "set one by one; give the whole value, for example model.attention={kind: rcmha, num_heads: 8}"
            )
    elif attention is not None:
        # The options of the replaced variant do not apply to the new one.
        config.model.pop("attention", None)
    try:
        config.merge_with({k: v for k, v in layer.values.items() if v is not None or k in _LEAVES})
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        problem = type_problem(key, layer.values, f"{key}: {str(error).splitlines()[0]}")
        raise ConfigError(f"{place_of(layer.places, key)}: {problem}") from None


_LEAVES = frozenset(f.name for f in fields(Config) if not is_dataclass(f.type) and f.name not in FREE_SECTIONS)


def _check_sections(config: Config, places: dict[str, str]) -> None:
    """Checks the free sections as the task says, and adds the place to its error messages. Raises ConfigError, also for
    what the task has no use for."""
    try:
        task = task_class(config)
    except ValueError as error:
        raise ConfigError(f"{place_of(places, 'task.kind')}: {error}") from None
    for key in task.UNUSED:
        if _value(config, key) != _value(Config(), key):
            raise ConfigError(
                f"{place_of(places, key)}: task.kind={config.task['kind']} has no use for "
                f"{key}={_value(config, key)!r}; leave it out"
            )
    for section, check in task.sections(config).items():
        try:
            check()
        except ValueError as error:
            problem = with_section(str(error), asdict(config))
            raise ConfigError(f"{_mentioned(places, section, str(error))}: {problem}") from None


def _value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def _mentioned(places: dict[str, str], section: str, message: str) -> str:
    """The place of the key of `section` that the message names, in full or else by the last word of the deepest one."""
    said = message.split(";")[0]
    whole = [key for key in re.findall(r"\w+(?:\.\w+)+", said) if key in places]
    if whole:
        return place_of(places, whole[0])
    words = set(re.findall(r"\w+", said))
    keys = [k for k in places if k.startswith(f"{section}.") and k.rsplit(".", 1)[1] in words]
    return place_of(places, max(keys, key=lambda k: k.count("."), default=section))
