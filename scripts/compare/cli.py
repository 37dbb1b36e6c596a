"""`python -m attnzoo compare`: the command line of a comparison."""

import argparse
import sys
from pathlib import Path

from attnzoo.figures import require_matplotlib
from attnzoo.report import Report, available_cores, format_claims, format_table
from attnzoo.workers import JobError
from scripts.compare.compare import compare
from scripts.compare.comparison import Comparison
from scripts.compare.config import QUICK, CompareConfig, parse_settings
from scripts.compare.plot import plot_all

EXAMPLES = """examples:
  python -m attnzoo compare --quick
  python -m attnzoo compare text=input.txt --workers 4 --json compare.json --figures figures
  python -m attnzoo compare variants=rmha,rcmha tables=parameters steps=200 seeds=5 --run-dir runs/short
  python -m attnzoo compare tables=paper paper.steps=157000 --run-dir runs/paper

tables: parameters (equal parameters), flops (equal training FLOPs), recall (associative recall), paper (the RCMHA
paper's own setting). Runs are kept in the run directory: the same command goes on where it was stopped. Settings and
their defaults are in scripts/compare/config.py; --show prints them with the runs and trains nothing.
"""


def main(arguments: list[str]) -> int:
    """Exit status 0 when all claims hold, 1 when one does not or a run fails, 2 for wrong usage, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m attnzoo compare",
        description="Train variants side by side on a text and measure them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="steps=200, variants=mha,rcmha, paper.steps=9")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report here")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write figures (PNG) here; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="tiny sizes that end within two minutes: no measurement")
    parser.add_argument("--run-dir", type=Path, help="default: runs/compare, or runs/compare-quick")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="runs side by side (default: %(default)s)"
    )
    parser.add_argument("--show", action="store_true", help="print settings and runs, train nothing")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        if chosen.workers < 1:
            raise ValueError(f"--workers={chosen.workers} must be at least 1")
        comparison = Comparison(parse_settings(chosen.settings, QUICK if chosen.quick else None))
        if chosen.show:
            print(show(comparison))
            return 0
        return run(comparison, chosen)
    except ValueError as error:
        print(f"attnzoo compare: error: {error}", file=sys.stderr)
        return 2
    except JobError as error:
        print(f"attnzoo compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, and the same command goes on", file=sys.stderr)
        return 130


def run(comparison: Comparison, chosen: argparse.Namespace) -> int:
    """Compares, prints the tables, writes report and figures."""
    report = Report.start(command=["python", "-m", "attnzoo", *sys.argv[1:]], quick=chosen.quick)
    directory = chosen.run_dir or Path("runs/compare-quick" if chosen.quick else "runs/compare")
    if chosen.figures is not None:
        require_matplotlib("--figures")
    comparison.text  # a wrong path is told before anything is trained  # noqa: B018
    results = compare(comparison, directory, chosen.workers, report)
    if chosen.figures is not None:
        report.figures += [str(path) for path in plot_all(comparison, results, chosen.figures)]
    print_tables(report)
    if chosen.json is not None:
        report.write(chosen.json)
    return report.exit_status()


def print_tables(report: Report) -> None:
    """Each table under its name, then the claims and where the numbers come from."""
    for name in dict.fromkeys(row["table"] for row in report.rows):
        rows = [{k: v for k, v in row.items() if k != "table"} for row in report.rows if row["table"] == name]
        print(f"{name}\n{format_table(rows)}\n")
    print(format_claims(report.claims))
    note = " (quick: sizes cut down, not a measurement)" if report.quick else ""
    print(f"{report.device}, load before {report.load_before}, commit {report.commit}{note}")


def show(comparison: Comparison) -> str:
    """Settings, and the runs with their widths and steps."""
    lines = [f"{key}={value}" for key, value in flat(comparison.config).items()]
    rows = [
        {"run": comparison.name(run), "mlp_dim": comparison.width(run), "steps": comparison.steps(run)}
        for run in {comparison.name(run): run for run in comparison.plan()}.values()
    ]
    return "\n".join([*lines, "", format_table(rows)])


def flat(config: CompareConfig) -> dict[str, str]:
    """Settings as the command line takes them."""
    found = {}
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            found.update({f"{key}.{name}": str(item) for name, item in value.items()})
        else:
            found[key] = ",".join(value) if isinstance(value, list) else str(value)
    return found
