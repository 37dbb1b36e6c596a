"""`attnzoo compare`: runs a comparison from its command line."""

import argparse
import sys
from pathlib import Path

from attnzoo.cli import carry_out
from attnzoo.errors import complain
from attnzoo.figures import require_matplotlib
from attnzoo.report import Report, format_claims, format_table
from attnzoo.workers import JobError
from scripts import arguments
from scripts.compare.compare import compare
from scripts.compare.comparison import Comparison
from scripts.compare.config import QUICK, CompareConfig, parse_settings
from scripts.compare.plot import plot_all


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo compare`; returns the exit status."""
    return carry_out("attnzoo compare", arguments.compare, run, sys.argv[1:] if words is None else words)


def run(chosen: argparse.Namespace) -> int:
    """Exit status: 0 if all claims hold, 1 if one does not or a run fails, 130 after Ctrl-C. Raises ValueError for
    wrong usage."""
    if chosen.workers < 1:
        raise ValueError(f"--workers={chosen.workers} must be at least 1")
    comparison = Comparison(parse_settings(chosen.settings, QUICK if chosen.quick else None))
    if chosen.show:
        print(show(comparison))
        return 0
    try:
        return measure(comparison, chosen)
    except JobError as error:
        return complain("attnzoo compare", str(error), 1)
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command resumes the comparison", file=sys.stderr)
        return 130


def measure(comparison: Comparison, chosen: argparse.Namespace) -> int:
    """Compares, prints the tables, and writes the report and the figures."""
    report = Report.start(command=chosen.command, quick=chosen.quick)
    directory = chosen.run_dir or Path("runs/compare-quick" if chosen.quick else "runs/compare")
    if chosen.figures is not None:
        require_matplotlib("--figures")
    comparison.text  # reports a wrong path before training  # noqa: B018
    results = compare(comparison, directory, chosen.workers, report)
    if chosen.figures is not None:
        report.figures += [str(path) for path in plot_all(comparison, results, chosen.figures)]
    print_tables(report)
    if chosen.json is not None:
        report.write(chosen.json)
    return report.exit_status()


def print_tables(report: Report) -> None:
    """Prints the tables, the claims, and where the numbers come from."""
    for name in dict.fromkeys(row["table"] for row in report.rows):
        rows = [{k: v for k, v in row.items() if k != "table"} for row in report.rows if row["table"] == name]
        print(f"{name}\n{format_table(rows)}\n")
    print(format_claims(report.claims))
    note = " (quick: sizes cut down, not a measurement)" if report.quick else ""
    print(f"{report.device}, load before {report.load_before}, commit {report.commit}{note}")


def show(comparison: Comparison) -> str:
    """The settings, and the runs with their widths and steps, as text."""
    lines = [f"{key}={value}" for key, value in flat(comparison.config).items()]
    rows = [
        {"run": comparison.name(run), "mlp_dim": comparison.width(run), "steps": comparison.steps(run)}
        for run in {comparison.name(run): run for run in comparison.plan()}.values()
    ]
    return "\n".join([*lines, "", format_table(rows)])


def flat(config: CompareConfig) -> dict[str, str]:
    """The settings in the form of the command line."""
    found = {}
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            found.update({f"{key}.{name}": str(item) for name, item in value.items()})
        else:
            found[key] = ",".join(value) if isinstance(value, list) else str(value)
    return found
