"""Makes the runs of a comparison in parallel; each writes its file."""

from functools import partial
from pathlib import Path
from typing import Any

from attnzoo.progress import Progress
from attnzoo.workers import Job, Tick, run_jobs
from scripts.compare.comparison import Comparison, Run
from scripts.compare.config import CompareConfig
from scripts.compare.runs import Hooks, finished, run_one


def run_all(comparison: Comparison, directory: Path, workers: int) -> list[tuple[Run, dict[str, Any]]]:
    """All runs with the contents of their files; makes missing runs, `workers` at a time (1: in this process).

    Raises ValueError for a file with other settings, and JobError if a run fails; finished files are kept.
    """
    runs = comparison.plan()
    files = {comparison.name(run): run for run in runs}
    missing = {name: run for name, run in files.items() if finished(comparison, run, directory) is None}
    progress = Progress(sum(comparison.steps(run) for run in missing.values()))
    if len(missing) < len(files):
        progress.say(f"{len(files) - len(missing)} of {len(files)} runs are in {directory}")
    values = comparison.config.to_dict()
    jobs: dict[str, Job] = {name: partial(_make, values, run, directory) for name, run in missing.items()}
    try:
        run_jobs(jobs, workers, progress)
    finally:
        progress.close()
    return [(run, run_one(comparison, run, directory)) for run in runs]


def _make(values: dict[str, Any], run: Run, directory: Path, tick: Tick) -> None:
    run_one(Comparison(CompareConfig.from_dict(values)), run, directory, Hooks(tick=tick))
