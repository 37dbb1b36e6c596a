"""Reads settings: YAML configuration files and `key=value` arguments.

`read_mapping` reads configuration files of training, serving and planning; `parse_word` reads one `key=value` argument
of a command. Types are those of YAML 1.2: 1e-6 is a number, `no` and `on` are strings, 010 is ten. A key that is set
twice, or a number that is not finite, is an error. Needs the package pyyaml.
"""

import functools
import importlib
import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from attnzoo.files import read_text

NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
INT = re.compile(r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
"""Tried after INT, which it matches too."""
MOST_VALUES = 100_000
"""The most values of a file or a word. A few lines of aliases can stand for millions of values, all of which would be
copied."""


def parse_words(words: Iterable[str], example: str, *, as_text: Collection[str] = (), hint: str = "") -> dict[str, Any]:
    """A dictionary from `key=value` words. Arguments and errors are those of `parse_word`; raises ValueError also for a
    key that comes twice.

    >>> parse_words(["port=8001", "cache={policy: d2o}"], "port=8001")
    {'port': 8001, 'cache': {'policy': 'd2o'}}
    """
    found: dict[str, Any] = {}
    for word in words:
        key, value = parse_word(word, example, as_text=as_text, hint=hint)
        check_new(key, found)
        found[key] = value
    return found


def check_new(key: str, known: Collection[str], where: str = "") -> None:
    """Raises ValueError for a key among those that are known already: of two values one would be lost. where: the
    beginning of the message."""
    if key in known:
        raise ValueError(f"{where}{key} is given twice; keep one of them")


def parse_word(
    word: str, example: str, *, as_text: Collection[str] = (), where: str = "", hint: str = ""
) -> tuple[str, Any]:
    """Splits `key=value` into (key, value), and parses the value as YAML.

    as_text: keys whose values are not parsed, for example paths. where: the beginning of error messages. hint: the end
    of the message about a malformed word. Raises ValueError for a word without "=" or with an empty part in its dotted
    key (the message shows `example`), for a word without a value, and for a value that is not YAML.
    """
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ValueError(f"{where}{word!r} is not of the form key=value, for example {example}{hint}")
    if key in as_text:
        return key, text
    if not text.strip():  # YAML would read null: a shell's variable that is not set would mean "no limit"
        raise ValueError(f"{where}{key}= has no value; write {key}=null for none, or {key}=\"''\" for an empty text")
    return key, parse_yaml(text, f"{where}{key}")


def read_mapping(path: Path, name: str | None = None) -> tuple[dict[str, Any] | None, dict[str, int]]:
    """(content of a YAML file, line number of every dotted key in it); the content of an empty file is None.

    name: the file's name in error messages (None: its path). Raises ValueError for a file that does not exist, cannot
    be read, or holds anything but a mapping.
    """
    name = str(path) if name is None else name
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ValueError(f"{name}: cannot be read: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"{name}: cannot be read as YAML: {error}") from None
    values, lines = parse_lines(text, name)
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{name}: the file holds a {type(values).__name__}; it must be a mapping, `key: value` a line")
    return values, lines


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML. Raises ValueError with a message of one line that begins with `where`."""
    return parse_lines(text, where, numbered=False)[0]


def parse_lines(text: str, where: str, numbered: bool = True) -> tuple[Any, dict[str, int]]:
    """Parses YAML into (value, line number of every dotted key). numbered: error messages begin with `where:line`."""
    yaml = _yaml(where)
    lines: dict[str, int] = {}
    try:
        reader = _loader()(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None, {}
            for mark, problem in _problems(node, "", lines, {}):
                raise ValueError(f"{where}:{mark.line + 1}: {problem}" if numbered else f"{where}: {problem}")
            if _size(node, {}) > MOST_VALUES:
                raise ValueError(f"{where}: holds more than {MOST_VALUES:,} values, each as often as aliases repeat it")
            return _constructed(reader, node, where), lines
        finally:
            reader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{where}: cannot be read as YAML: {detail}") from None


def _size(node: Any, known: dict[int, int]) -> int:
    """Keys and values at and below a node that does not hold itself; what an alias stands for counts each time."""
    if id(node) not in known:
        parts = [part for item in node.value for part in item] if node.id == "mapping" else node.value
        known[id(node)] = 1 if node.id == "scalar" else 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _constructed(reader: Any, node: Any, where: str) -> Any:
    try:
        return reader.construct_document(node)
    except ValueError as error:  # "!!int word", or more digits than Python reads
        raise ValueError(f"{where}: cannot be read as YAML: {error}") from None


def _problems(node: Any, prefix: str, lines: dict[str, int], done: dict[int, bool]) -> Iterator[tuple[Any, str]]:
    """Yields (position, problem) for the faults below a node, and enters line numbers of keys into `lines`. done: False
    for nodes being visited, True for visited ones; aliases may lead to a node again."""
    if id(node) in done:
        if not done[id(node)]:
            yield node.start_mark, f"{prefix.removesuffix('.') or 'the value'} contains itself"
        return
    done[id(node)] = False
    if node.id == "scalar":
        if node.tag == "tag:yaml.org,2002:float" and not _is_finite(node.value):
            key = f"{prefix.removesuffix('.')}={node.value}" if prefix else node.value
            yield node.start_mark, f"{key} is not a finite number"
    elif node.id == "sequence":
        for item in node.value:
            yield from _problems(item, prefix, lines, done)
    else:
        own: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name = f"{prefix}{key.value}" if key.id == "scalar" else prefix
            if key.id == "scalar":
                line = key.start_mark.line + 1
                if (key.tag, key.value) in own:
                    first = own[key.tag, key.value]
                    yield key.start_mark, f"{name} is set twice, first in line {first}; keep one of them"
                lines[name] = own[key.tag, key.value] = line
            yield from _problems(value, f"{name}.", lines, done)
    done[id(node)] = True


def _yaml(where: str) -> Any:
    try:
        return importlib.import_module("yaml")
    except ModuleNotFoundError:
        raise ValueError(f"{where}: reading YAML needs the package pyyaml: pip install pyyaml") from None


def _is_finite(text: str) -> bool:
    """Whether the text is a finite number; True also for text that is no number, which another check refuses."""
    try:
        return math.isfinite(_float(text))
    except ValueError:  # "!!float word"
        return True


def _int(text: str) -> int:
    digits = text.replace("_", "")
    return int(digits, 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10)


def _float(text: str) -> float:
    digits = text.replace("_", "").lower()
    return float(digits.replace(".inf", "inf").replace(".nan", "nan"))


@functools.cache
def _loader() -> Any:
    """pyyaml's safe loader, with the scalar types of YAML 1.2."""
    yaml = importlib.import_module("yaml")

    kept = {
        first: [(tag, rule) for tag, rule in rules if tag.endswith(":merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        yaml_implicit_resolvers = kept

    for name, rule, first in (
        ("null", NULL, ["~", "n", "N", ""]),
        ("bool", BOOL, list("tTfF")),
        ("int", INT, list("-+0123456789")),
        ("float", FLOAT, list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", rule, first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(loader.construct_scalar(node)))
    return Loader
