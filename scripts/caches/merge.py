"""Merges a run of some sections into a stored report, whose other sections are kept.

The beginning of a table's or claim's name identifies its section. The table "runs" has a row with command, commit and
machine for each section.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.report import Claim, Report

RUNS = "runs"


def section_of(name: str) -> str:
    """The section of a table or claim with this name."""
    told = {"symbols": ("symbols",), "text": ("text", "fidelity", "kvpress"), "parts": ("parts",)}
    for section, beginnings in told.items():
        if name.startswith(beginnings):
            return section
    return "speed"


def run_row(section: str, report: Report) -> dict[str, Any]:
    """The row of the table "runs" for a section."""
    return {
        "table": RUNS,
        "section": section,
        "command": " ".join(report.command),
        "commit": report.commit,
        "device": report.device,
        "load before": report.load_before,
    }


def merged(report: Report, sections: Sequence[str], path: Path) -> Report:
    """`report`, which has measured `sections`, with the other sections of the report at `path`.

    Raises ValueError if only one of the two was made with --quick.
    """
    old = json.loads(path.read_text(encoding="utf-8"))
    if old["quick"] != report.quick:
        raise ValueError(f"{path} has quick={old['quick']}, this run {report.quick}: name another file with --json")

    def kept(row: dict[str, Any]) -> bool:
        return (row["section"] if row["table"] == RUNS else section_of(row["table"])) not in sections

    claims = [{key: value for key, value in claim.items() if key != "holds"} for claim in old["claims"]]
    return Report(
        command=report.command,
        commit=report.commit,
        seed=report.seed,
        device=report.device,
        load_before=report.load_before,
        versions=report.versions,
        quick=report.quick,
        rows=[row for row in old["rows"] if kept(row)] + report.rows,
        claims=[Claim(**claim) for claim in claims if section_of(claim["name"]) not in sections] + report.claims,
        figures=list(dict.fromkeys(old["figures"] + report.figures)),
    )
