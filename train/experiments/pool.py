"""The parts of experiments side by side: processes of one thread each, a progress bar over all of them."""

import multiprocessing
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import Any

from attnzoo.progress import Progress
from train.experiments.base import Experiment, ExperimentConfig, Values

Found = dict[tuple[str, str], Values]
_TICKS: Any = None
"""In a worker: the queue on which it tells how many steps it has done."""


class PartError(RuntimeError):
    """A part failed; the message names it."""


def known_experiments() -> dict[str, Experiment]:
    """All experiments by their names on the command line."""
    from train.experiments import depth, icl_claims, one_step_gd, softmax_regression

    found = (icl_claims.EXPERIMENT, one_step_gd.EXPERIMENT, softmax_regression.EXPERIMENT, depth.EXPERIMENT)
    return {experiment.name: experiment for experiment in found}


def measure(
    experiments: list[Experiment], config: ExperimentConfig, workers: int
) -> tuple[Found, dict[tuple[str, str], float]]:
    """(values of every part by experiment and name, seconds of every part). Longest parts start first.

    Raises PartError when a part fails.
    """
    parts = {(e.name, name): part for e in experiments for name, part in e.parts(config).items()}
    order = sorted(parts, key=lambda key: -parts[key].steps)
    progress = Progress(sum(part.steps for part in parts.values()))
    found: Found = {}
    seconds: dict[tuple[str, str], float] = {}
    try:
        if workers == 1:
            for key in order:
                found[key], seconds[key] = _run(key, config, partial(progress.add, 1, " ".join(key)))
        else:
            _side_by_side(order, config, workers, progress, found, seconds)
    finally:
        progress.close()
    return {key: found[key] for key in parts}, seconds


def _run(key: tuple[str, str], config: ExperimentConfig, tick: Callable[[], None]) -> tuple[Values, float]:
    name, part = key
    start = time.perf_counter()
    try:
        values = known_experiments()[name].parts(config)[part].run(config, tick)
    except Exception as error:
        raise PartError(f"{name}, {part}: {type(error).__name__}: {error}") from error
    return values, time.perf_counter() - start


def _side_by_side(
    order: list[tuple[str, str]],
    config: ExperimentConfig,
    workers: int,
    progress: Progress,
    found: Found,
    seconds: dict[tuple[str, str], float],
) -> None:
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(ticks,)) as pool:
        futures: dict[tuple[str, str], Future] = {key: pool.submit(_work, key, config) for key in order}
        try:
            while not all(future.done() for future in futures.values()):
                _listen(ticks, progress)
                for future in futures.values():
                    if future.done():
                        future.result()
            while _listen(ticks, progress):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for key, future in futures.items():
            found[key], seconds[key] = future.result()


def _start(ticks: Any) -> None:
    import torch

    global _TICKS
    _TICKS = ticks
    torch.set_num_threads(1)


def _work(key: tuple[str, str], config: ExperimentConfig) -> tuple[Values, float]:
    counter = _Counter(" ".join(key))
    out = _run(key, config, counter.tick)
    counter.send()
    return out


class _Counter:
    """Tells the parent twice a second how many steps were done."""

    def __init__(self, label: str) -> None:
        self.label, self.steps, self.sent = label, 0, time.monotonic()

    def tick(self) -> None:
        self.steps += 1
        if time.monotonic() - self.sent > 0.5:
            self.send()

    def send(self) -> None:
        _TICKS.put((self.label, self.steps))
        self.steps, self.sent = 0, time.monotonic()


def _listen(ticks: Any, progress: Progress) -> bool:
    try:
        label, steps = ticks.get(timeout=0.2)
    except queue.Empty:
        return False
    progress.add(steps, label)
    return True
