"""Which source a model's plug-in variants were written from: weights trained by one formula are wrong for another.

Comments, docstrings and layout do not count. Variants of attnzoo itself change with its versions, and have no entry.
"""

import ast
import functools
import hashlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attnzoo.attention import ATTENTION, is_plugin
from attnzoo.errors import ChangedSourceWarning

Sources = dict[str, dict[str, str]]
"""{variant: {"file": the name of its file, "digest": of its content}}"""


def plugin_sources(model: nn.Module) -> Sources:
    """The sources of the plug-in variants that a model is made of, sorted by name. A class without a file (typed into
    an interpreter) has none."""
    classes = {type(module) for module in model.modules()}
    return sources_of(kind for kind in ATTENTION if ATTENTION.get(kind) in classes)


def sources_of(kinds: Iterable[str]) -> Sources:
    """The sources of those of the variants that are plug-ins, sorted by name."""
    found = {kind: _source(ATTENTION.get(kind)) for kind in sorted(kinds) if is_plugin(kind)}
    return {kind: source for kind, source in found.items() if source is not None}


def changed_sources(saved: Any) -> Iterator[tuple[str, str]]:
    """(variant, name of its present file) for each of the `plugin_sources` of a checkpoint that is another today.
    Nothing is known, and nothing said, of a checkpoint without them."""
    for kind, source in saved.items() if isinstance(saved, Mapping) else ():
        present = _source(ATTENTION.get(kind)) if kind in ATTENTION else None
        if present is not None and isinstance(source, Mapping) and present["digest"] != source.get("digest"):
            yield kind, present["file"]


def warn_of_changes(saved: Any, where: str | Path) -> None:
    """Warns of every variant whose file has changed since the model in `where` was written."""
    for kind, file in changed_sources(saved):
        warnings.warn(
            f"{file} has changed since {where} was written: its weights were trained with another {kind}. Put the file "
            "back, or train again",
            ChangedSourceWarning,
            stacklevel=2,
        )


# Kept, so that a file which is edited while it trains is not taken for the one that was imported.
@functools.cache
def _source(cls: type) -> dict[str, str] | None:
    try:
        path = Path(inspect.getsourcefile(cls) or "")
        tree = ast.parse(path.read_bytes())
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    return {"file": path.name, "digest": hashlib.sha256(repr(_form(tree)).encode()).hexdigest()[:16]}


def _form(node: Any) -> Any:
    """A syntax tree as nested lists, the same in every version of Python, without docstrings."""
    if isinstance(node, list):
        return [_form(each) for each in node if not _is_text(each)]
    if not isinstance(node, ast.AST):
        return repr(node)
    given = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *([name, _form(value)] for name, value in given if name not in ("ctx", "kind"))]


def _is_text(node: Any) -> bool:
    """Whether a statement is a text and does nothing, as docstrings are."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
