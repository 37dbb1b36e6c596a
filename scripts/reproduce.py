"""`attnzoo reproduce`: repeats published experiments on attention and checks every claim."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.cli import carry_out
from attnzoo.errors import complain
from attnzoo.figures import require_matplotlib
from attnzoo.files import user_path
from attnzoo.report import Claim, Report, format_table
from attnzoo.settings import parse_words
from attnzoo.workers import JobError
from scripts import arguments
from train.experiments.base import Experiment, ExperimentConfig
from train.experiments.pool import known_experiments, measure

WITH_VARIANT = ("icl-gd", "depth")


def configure(chosen: argparse.Namespace) -> tuple[list[Experiment], ExperimentConfig]:
    """The experiments and their configuration. Raises ValueError for options that contradict one another."""
    options = parse_words(chosen.options, "num_heads=2")
    experiments = known_experiments()
    names = [chosen.experiment]
    if chosen.experiment == "all":
        names = [name for name, experiment in experiments.items() if not experiment.data and not experiment.trained]
    data = _place([experiments[name] for name in names], "data", chosen.data)
    trained = _place([experiments[name] for name in names], "run", chosen.run)
    known = [group for name in names for group in experiments[name].optional]
    for group in chosen.without:
        if group not in known:
            has = f"; it has {', '.join(known)}" if known else ", which has no parts that may be left out"
            raise ValueError(f"--without={group} is no part of {chosen.experiment}{has}")
    if chosen.workers < 1:
        raise ValueError(f"--workers={chosen.workers} must be at least 1")
    if options and chosen.variant is None:
        raise ValueError(f"options {', '.join(chosen.options)} belong to a variant; name it with --variant")
    if chosen.variant is not None:
        ATTENTION.get(chosen.variant)
        if not set(names) <= set(WITH_VARIANT):
            raise ValueError(f"--variant={chosen.variant} is for {' and '.join(WITH_VARIANT)}, not {chosen.experiment}")
        if "model_dim" in options:
            raise ValueError("the experiment sets model_dim; leave it out")
        attention = build_attention(chosen.variant, {"model_dim": 32, **options}, chosen.variant)
        if "depth" in names and not attention.traits.causal:
            raise ValueError(
                f"{chosen.variant!r} is not causal, but depth needs a prediction at every token; use icl-gd"
            )
    if chosen.results:
        require_matplotlib("--results")
    config = ExperimentConfig(
        seed=chosen.seed,
        quick=chosen.quick,
        variant=chosen.variant,
        options=options,
        data=data,
        trained=trained,
        without=tuple(chosen.without),
    )
    return [experiments[name] for name in names], config


def _place(experiments: list[Experiment], option: str, given: Path | None) -> Path | None:
    """The place of the data set, or of the run, that the experiments need. Raises ValueError where there is none."""
    needs = {each.name: each.data if option == "data" else each.trained for each in experiments}
    needing = [(name, what) for name, what in needs.items() if what]
    if given is None:
        if needing:
            name, what = needing[0]
            raise ValueError(f"{name} needs --{option} PATH: {what}")
        return None
    if not needing:
        raise ValueError(f"--{option}={given} is of no use to {', '.join(needs)}; leave it out")
    path = user_path(str(given), f"--{option}")
    if not path.exists():
        name, what = needing[0]
        raise ValueError(f"--{option}={given} does not exist; {name} needs {what}")
    return path


def reproduce(
    experiments: list[Experiment], config: ExperimentConfig, workers: int, figures: Path | None, command: list[str]
) -> dict[str, Report]:
    """Measures, judges and draws; returns a report for each experiment, by name."""
    blank = Report.start(command=command, seed=config.seed, quick=config.quick)
    start = time.perf_counter()
    found, seconds = measure(experiments, config, workers)
    elapsed = time.perf_counter() - start
    reports = {}
    for experiment in experiments:
        values = {part: value for (name, part), value in found.items() if name == experiment.name}
        times = [{"what": part, "seconds": round(seconds[experiment.name, part], 1)} for part in values]
        judged = experiment.judge(config, values)
        times.append({"what": f"all of this run, {workers} at a time", "seconds": round(elapsed, 1)})
        judged.table(f"{experiment.letter}: seconds", times)
        drawn = [] if figures is None else experiment.draw(values, figures)
        reports[experiment.name] = replace(
            blank, rows=judged.rows, claims=judged.claims, figures=[path.name for path in drawn]
        )
    return reports


def together(reports: list[Report]) -> Report:
    """Several reports as one."""
    return replace(
        reports[0],
        rows=[row for report in reports for row in report.rows],
        claims=[claim for report in reports for claim in report.claims],
        figures=[name for report in reports for name in report.figures],
    )


def print_report(report: Report) -> None:
    """Prints the tables, the claims, and where the numbers come from."""
    for name in dict.fromkeys(row["table"] for row in report.rows):
        rows = [{k: v for k, v in row.items() if k != "table"} for row in report.rows if row["table"] == name]
        print(f"{name}\n{format_table(rows)}\n")
    print(format_table([claim_row(claim) for claim in report.claims]))
    note = " (quick: sizes cut down, not a measurement)" if report.quick else ""
    print(f"{report.device}, load before {report.load_before}, commit {report.commit}{note}")


def claim_row(claim: Claim) -> dict[str, Any]:
    """A claim as a table row."""
    return {
        "claim": claim.name,
        "expected": f"{claim.kind.replace('_', ' ')} {claim.expected:.4g}",
        "measured": claim.measured,
        "tolerance": claim.tolerance,
        "holds": "yes" if claim.holds else "NO",
    }


def run(chosen: argparse.Namespace) -> int:
    """Exit status: 0 if all claims hold, 1 if one does not or a part fails, 130 after Ctrl-C. Raises ValueError for
    wrong usage."""
    experiments, config = configure(chosen)
    try:
        reports = reproduce(experiments, config, chosen.workers, chosen.results, chosen.command)
    except JobError as error:
        return complain("attnzoo reproduce", str(error), 1)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    report = together(list(reports.values()))
    print_report(report)
    if chosen.results is not None:
        for name, one in reports.items():
            one.write(chosen.results / f"{name}.json")
    if chosen.json is not None:
        report.write(chosen.json)
    return report.exit_status()


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo reproduce`; returns the exit status."""
    return carry_out("attnzoo reproduce", arguments.reproduce, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
