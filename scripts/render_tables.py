"""Renders the tables of the pages in docs/ from the reports in docs/results.

    python scripts/render_tables.py            # rewrites the tables
    python scripts/render_tables.py --check    # exit status 1 if a table is out of date

A table stands between `<!-- rows FILE [TABLE] [| COLUMN, COLUMN] -->` or
`<!-- claims FILE [PREFIX] [| COLUMN, COLUMN] -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from attnzoo.report import format_value
from scripts.caches.merge import RUNS, section_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = [
    *(ROOT / "docs" / name for name in ("benchmarks.md", "caches.md", "compare.md")),
    *sorted((ROOT / "docs" / "experiments").glob("*.md")),
]
MARKED = re.compile(r"(<!-- (rows|claims) (\S+)(?: ([^|>]+?))?(?: \| ([^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table with a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([format_value(row.get(c, "")) for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def provenance(report: dict[str, Any], run: dict[str, Any] | None) -> str:
    """One line about the origin of the numbers. run: the run of the section, if sections were measured one by one."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name != "attnzoo")
    whole = {**report, "command": " ".join(report["command"]), "load before": report["load_before"]}
    source = whole if run is None else run
    place = f"{source['device']}, load before {source['load before']}"
    note = "; **quick: sizes cut down, not a measurement**" if report.get("quick") else ""
    return f"`{source['command']}`, commit {source['commit']}, {place}, {versions}{note}\n"


def run_of(report: dict[str, Any], table: str) -> dict[str, Any] | None:
    """The row of the table "runs" for a table or claim; None if the whole report comes from one run."""
    runs = [row for row in report["rows"] if row.get("table") == RUNS]
    return next((row for row in runs if row["section"] == section_of(table)), None)


def render(text: str) -> str:
    """The text with every marked table rendered again. The first table of a report or section shows its provenance.

    Raises ValueError for a marker without rows.
    """
    told: set[tuple[str, str]] = set()

    def table(match: re.Match[str]) -> str:
        opening, kind, name, wanted, columns, closing = match.groups()
        report = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        if kind == "claims":
            keys = columns.split(", ") if columns else ("name", "kind", "expected", "measured", "tolerance", "holds")
            chosen = [claim for claim in report["claims"] if claim["name"].startswith(wanted or "")]
            rows = [{key: claim[key] for key in keys} for claim in chosen]
        else:
            rows = [dict(row) for row in report["rows"] if wanted is None or row.get("table") == wanted]
            kept = columns.split(", ") if columns else None
            rows = [{k: v for k, v in row.items() if (k in kept if kept else k != "table")} for row in rows]
        if not all(rows) or not rows:
            raise ValueError(f"docs/results/{name} has no {kind} {wanted or ''} {columns or ''}")
        run = run_of(report, wanted or "")
        part = (name, run["section"] if run else "")
        origin = "" if part in told or wanted == RUNS else f"\n{provenance(report, run)}"
        told.add(part)
        return f"{opening}{markdown(rows)}{origin}{closing}"

    return MARKED.sub(table, text)


def main() -> int:
    """Rewrites or checks the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only, write nothing")
    chosen = parser.parse_args()
    stale = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        rendered = render(text)
        if not chosen.check:
            document.write_text(rendered, encoding="utf-8")
        elif rendered != text:
            stale = 1
            print(f"{document.name} does not show docs/results; run python scripts/render_tables.py", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
