"""Markdown of the cards: documents of sections, tables, and lists of options."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnzoo.clinical.run_facts import UNKNOWN
from attnzoo.report import format_value

MARK = "<!-- written by attnzoo card; written anew by the same command -->"
Sections = Mapping[str, str]
"""Texts by the titles of their sections."""


def document(title: str, sections: Sections) -> str:
    """A whole Markdown file."""
    parts = [MARK, f"# {title}", *(f"## {name}\n\n{text.strip()}" for name, text in sections.items())]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = format_value(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def options(values: Mapping[str, Any]) -> str:
    """A list of `key: value`."""
    told = [f"- `{key}`: {json.dumps(value) if not isinstance(value, str) else value}" for key, value in values.items()]
    return "\n".join(told) or UNKNOWN
