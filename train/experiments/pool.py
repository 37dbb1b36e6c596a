"""Runs the parts of experiments in parallel."""

import time
from functools import partial

from attnzoo.progress import Progress
from attnzoo.workers import Job, Tick, run_jobs
from train.experiments.base import Experiment, ExperimentConfig, Values

Found = dict[tuple[str, str], Values]


def known_experiments() -> dict[str, Experiment]:
    """All experiments by their names on the command line."""
    from train.experiments import (
        depth,
        icl_claims,
        ldam,
        one_step_gd,
        ph_llm,
        prime_composer,
        softmax_regression,
        tscan,
        tscan_los,
        var,
    )

    in_context = (icl_claims.EXPERIMENT, one_step_gd.EXPERIMENT, softmax_regression.EXPERIMENT, depth.EXPERIMENT)
    clinical = (tscan.EXPERIMENT, tscan_los.EXPERIMENT, ldam.EXPERIMENT, ph_llm.EXPERIMENT)
    found = (*in_context, *clinical, prime_composer.EXPERIMENT, var.EXPERIMENT)
    return {experiment.name: experiment for experiment in found}


def measure(
    experiments: list[Experiment], config: ExperimentConfig, workers: int
) -> tuple[Found, dict[tuple[str, str], float]]:
    """(values, seconds) of every part, each by (experiment, part). The longest parts start first.

    Raises JobError if a part fails.
    """
    parts = {(e.name, name): part for e in experiments for name, part in e.parts(config).items()}
    order = sorted(parts, key=lambda key: -parts[key].steps)
    jobs: dict[str, Job] = {", ".join(key): partial(_run, key, config) for key in order}
    progress = Progress(sum(part.steps for part in parts.values()))
    try:
        results = run_jobs(jobs, workers, progress)
    finally:
        progress.close()
    found = {key: results[", ".join(key)] for key in parts}
    return {key: values for key, (values, _) in found.items()}, {key: seconds for key, (_, seconds) in found.items()}


def _run(key: tuple[str, str], config: ExperimentConfig, tick: Tick) -> tuple[Values, float]:
    name, part = key
    start = time.perf_counter()
    values = known_experiments()[name].parts(config)[part].run(config, tick)
    return values, time.perf_counter() - start
