"""Reads configuration files and overrides into nested values, with the place of each key for error messages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnzoo.apps import directory, find_config
from attnzoo.errors import suggest
from attnzoo.settings import check_new, parse_word, read_mapping

CONFIGS = directory() / "configs"
COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """An error in a configuration file or an override; its message is one line."""


@dataclass(frozen=True)
class ConfigLayer:
    """One source of values: a nested mapping, and the place (file:line) of every dotted key in it."""

    values: dict[str, Any]
    places: dict[str, str]


def read_layers(name: str, overrides: Sequence[str]) -> list[ConfigLayer]:
    """The layers, of which later ones override earlier ones: the file's bases, the farthest first; the file (a bare
    name is looked up in configs/); the overrides. Raises ConfigError.
    """
    given: set[str] = set()
    layers = [*_chain(_find_config(name), ()), *(_override(text, given) for text in overrides)]
    for layer in layers:
        _check_given(layer)
    return layers


def _find_config(name: str) -> Path:
    """The file for --config. Raises ConfigError that suggests a file of configs/ if it does not exist."""
    try:
        path = find_config(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if path.is_file():
        return path
    if path.exists():
        what = "a directory" if path.is_dir() else "a device or a pipe"
        raise ConfigError(f"--config={name!r} is {what}; give a file, which a resumed run can read again")
    known = sorted(p.name for p in CONFIGS.glob("*.yaml"))
    raise ConfigError(f"--config: no file {name!r}{suggest(name, known)}")


def _chain(path: Path, seen: tuple[Path, ...]) -> list[ConfigLayer]:
    """Layers from the farthest base to `path`. seen: files that led here, to find cycles."""
    path = path.resolve()
    if path in seen:
        names = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(f"{_short(path)}: base files form a cycle: {names}")
    layer = _read(path)
    base = layer.values.pop("base", None)
    if base is None:
        return [layer]
    base_path = path.parent / str(base)
    if not base_path.is_file():
        ours = CONFIGS / Path(str(base)).name
        way_out = f"write base: {ours} for the one of this project" if ours.is_file() else "give a path from there"
        raise ConfigError(f"{layer.places['base']}: base: {base} does not exist beside {path.name}; {way_out}")
    return [*_chain(base_path, (*seen, path)), layer]


def _read(path: Path) -> ConfigLayer:
    name = _short(path)
    try:
        values, lines = read_mapping(path, name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if values is None:
        raise ConfigError(f"{name} is empty; write keys and values, for example base: base.yaml")
    return ConfigLayer(values, {key: f"{name}:{line}" for key, line in lines.items()})


def _override(text: str, given: set[str]) -> ConfigLayer:
    """The layer of one word. given: keys of the words before it, to which its own is added."""
    try:
        key, nested = parse_word(text, "train.steps=100", where=f"{COMMAND_LINE}: ")
        check_new(key, given, where=f"{COMMAND_LINE}: ")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    given.add(key)
    parts, places = key.split("."), {}
    for i in range(len(parts), 0, -1):
        places[".".join(parts[:i])] = COMMAND_LINE
        nested = {parts[i - 1]: nested}
    return ConfigLayer(nested, places)


def _check_given(layer: ConfigLayer) -> None:
    """Raises ConfigError for ???, which OmegaConf takes for a missing value and would ignore."""
    for key, value in _leaves("", layer.values):
        if value == "???":
            raise ConfigError(
                f"{place_of(layer.places, key)}: {key}=??? is OmegaConf's sign for a missing value; give a value"
            )


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(prefix, inner)
    else:
        yield prefix, value


def place_of(places: dict[str, str], key: str) -> str:
    """The place of `key`, or of the innermost section around it that has one."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "configuration")


def _short(path: Path) -> str:
    """The path for messages, relative to the current directory if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
