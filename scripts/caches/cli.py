"""The work of `attnzoo bench cache`, from its command line."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from attnzoo.report import Report, format_claims, format_table
from scripts.arguments import CACHE_CHECKPOINT, CACHE_SECTIONS
from scripts.caches import sections
from scripts.caches.figure import plot_quality
from scripts.caches.merge import merged, run_row
from scripts.caches.models import load_text_model, random_reader
from scripts.caches.peer import Exchange, PeerError
from scripts.caches.settings import QUICK, Settings

BUSY = 0.75
"""A higher load average makes timings unreliable."""

Trainer = Callable[[Path], Path]
"""Trains the small model in a run directory unless it exists; returns its export. Raises ValueError."""


def measure(chosen: argparse.Namespace, train: Trainer, peer_script: Path) -> int:
    """Measures the chosen sections. Exit status: 0 if all claims hold, 1 if one does not or kvpress fails. Raises
    ValueError for wrong usage."""
    names = chosen.sections.split(",")
    for name in names:
        if name not in CACHE_SECTIONS:
            raise ValueError(f"--sections: unknown section {name!r}; known: {', '.join(CACHE_SECTIONS)}")
    if chosen.roofline and "speed" not in names:
        raise ValueError("--roofline needs the bytes that the section speed measures; add it to --sections")
    if chosen.quick and chosen.checkpoint != CACHE_CHECKPOINT:
        raise ValueError(
            f"--checkpoint={chosen.checkpoint!r}: --quick takes tiny random models; leave out one of the two"
        )
    if chosen.update and chosen.json is None:
        raise ValueError("--update needs --json, the report to update")
    report = Report.start(command=_command(chosen), quick=chosen.quick)
    if report.load_before > BUSY:
        print(f"load average {report.load_before} is above {BUSY}: timings may be unreliable", file=sys.stderr)
    failed, done = False, []
    for name in names:
        done.append(name)
        report.rows.append(run_row(name, report))
        try:
            _measure(name, chosen, report, train, peer_script)
        except PeerError as error:
            print(f"attnzoo bench cache: kvpress is left out: {error}", file=sys.stderr)
            failed = True
        _save(chosen, report, done)
    _show(report)
    return 1 if failed else report.exit_status()


def _command(chosen: argparse.Namespace) -> list[str]:
    """The command line, without the path of kvpress on this machine."""
    place = str(chosen.kvpress_python)
    return [word.replace(place, "ENVIRONMENT/bin/python") for word in chosen.command]


def _measure(name: str, chosen: argparse.Namespace, report: Report, train: Trainer, peer_script: Path) -> None:
    """Measures one section."""
    settings = QUICK if chosen.quick else Settings()
    if name == "symbols":
        text_model = random_reader("mdha") if chosen.quick else load_text_model(str(train(chosen.run_dir)))
        sections.symbols(text_model, settings, report)
    elif name == "text":
        text_model = random_reader() if chosen.quick else load_text_model(chosen.checkpoint)
        peer = None
        if chosen.kvpress_python is not None:
            directory = chosen.run_dir.parent / "kvpress"
            directory.mkdir(parents=True, exist_ok=True)
            peer = Exchange(Path(chosen.kvpress_python), peer_script, directory)
        sections.text(text_model, settings, report, peer)
    elif name == "parts":
        text_model = random_reader() if chosen.quick else load_text_model(chosen.checkpoint)
        sections.parts(text_model, settings, report)
    else:
        text_model = random_reader() if chosen.quick else load_text_model(chosen.checkpoint, speed_dtype())
        speeds = sections.speed(text_model.model, settings, report)
        if chosen.roofline:
            sections.roofline(text_model.model, speeds, report)


def speed_dtype() -> torch.dtype:
    """bfloat16; float32 on a CPU without bfloat16 instructions, where emulation would be timed."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _save(chosen: argparse.Namespace, report: Report, done: Sequence[str]) -> None:
    """Writes the figure and the report of the sections so far, so that a failure of a later one loses nothing."""
    if chosen.update and chosen.json.exists():
        report = merged(report, done, chosen.json)
    drawn = [row for row in report.rows if row["table"] in ("symbols", "text")]
    if chosen.figure is not None and drawn:
        report.figures = [plot_quality(drawn, chosen.figure).name]
    if chosen.json is not None:
        report.write(chosen.json)


def _show(report: Report) -> None:
    """Prints the tables and claims; tables by seed are only in the report."""
    for title in dict.fromkeys(row["table"] for row in report.rows):
        if not title.endswith("by seed"):
            rows = [{k: v for k, v in row.items() if k != "table"} for row in report.rows if row["table"] == title]
            print(f"\n{title}\n{format_table(rows)}")
    if report.claims:
        print(f"\n{format_claims(report.claims)}")
    note = " (quick: random models and small sizes, not a measurement)" if report.quick else ""
    print(f"{report.device}, load before {report.load_before}, commit {report.commit}{note}")
