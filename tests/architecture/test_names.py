"""Distinct things have distinct names: no two classes of attnzoo, train and serve share one."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def places_of_classes() -> dict[str, list[str]]:
    """Where each class is defined, nested ones too."""
    places: dict[str, list[str]] = defaultdict(list)
    for room in ("attnzoo", "train", "serve"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path.relative_to(ROOT).as_posix()}:{node.lineno}")
    return places


def test_no_two_classes_share_a_name():
    places = places_of_classes()
    assert len(places) > 300, "the classes are not found"
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, f"rename one of each: {twice}"
