"""Runs side by side: processes of one thread each, which take runs from a queue and write their files."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

from attnzoo.progress import Progress
from scripts.compare.comparison import Comparison, Run
from scripts.compare.config import CompareConfig
from scripts.compare.runs import Hooks, finished, run_one

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class RunError(RuntimeError):
    """A run failed in its process; the message ends with its traceback."""


def run_all(comparison: Comparison, directory: Path, workers: int) -> list[tuple[Run, dict[str, Any]]]:
    """All runs with the contents of their files; makes what is missing, `workers` at a time (1: in this process).

    Raises ValueError for a file of other settings, RunError when a run fails: the others' files are kept.
    """
    runs = comparison.plan()
    files = {comparison.name(run): run for run in runs}
    missing = {name: run for name, run in files.items() if finished(comparison, run, directory) is None}
    progress = Progress(sum(comparison.steps(run) for run in missing.values()))
    if len(missing) < len(files):
        progress.say(f"{len(files) - len(missing)} of {len(files)} runs are in {directory}")
    try:
        if workers > 1 and len(missing) > 1:
            _side_by_side(comparison.config, missing, directory, workers, progress)
        else:
            for name, run in missing.items():
                run_one(comparison, run, directory, Hooks(tick=partial(progress.add, 1, name)))
    finally:
        progress.close()
    return [(run, run_one(comparison, run, directory)) for run in runs]


def _side_by_side(
    config: CompareConfig, runs: dict[str, Run], directory: Path, workers: int, progress: Progress
) -> None:
    context = multiprocessing.get_context("spawn")
    tasks, messages = context.Queue(), context.Queue()
    for item in [*runs.items(), *[None] * workers]:
        tasks.put(item)
    arguments = (config.to_dict(), str(directory), tasks, messages)
    processes = [context.Process(target=_work, args=arguments) for _ in range(min(workers, len(runs)))]
    try:
        with _one_thread():
            for process in processes:
                process.start()
        while any(process.is_alive() for process in processes):
            _listen(messages, progress)
            for process in processes:
                if process.exitcode:
                    _failed(process, messages, progress)
        while _listen(messages, progress):
            pass
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(values: dict[str, Any], directory: str, tasks: Any, messages: Any) -> None:
    """A worker: makes runs until there are none. Ctrl-C reaches the whole group: the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    comparison = Comparison(CompareConfig.from_dict(values))
    while (item := tasks.get()) is not None:
        name, run = item
        counter = _Counter(name, messages)
        try:
            run_one(comparison, run, Path(directory), Hooks(tick=counter.tick))
        except Exception:
            messages.put((name, 0, traceback.format_exc()))
            raise SystemExit(1) from None
        counter.send()


class _Counter:
    """Tells the parent twice a second how many steps were done."""

    def __init__(self, name: str, messages: Any) -> None:
        self.name, self.messages, self.steps, self.sent = name, messages, 0, time.monotonic()

    def tick(self) -> None:
        self.steps += 1
        if time.monotonic() - self.sent > 0.5:
            self.send()

    def send(self) -> None:
        self.messages.put((self.name, self.steps, None))
        self.steps, self.sent = 0, time.monotonic()


def _listen(messages: Any, progress: Progress) -> bool:
    """Handles one message, if there is one soon. Raises RunError when it is of a failure."""
    try:
        name, steps, problem = messages.get(timeout=0.2)
    except Empty:
        return False
    if problem is not None:
        raise RunError(f"{name} failed:\n{problem}")
    progress.add(steps, name)
    return True


def _failed(process: BaseProcess, messages: Any, progress: Progress) -> None:
    while _listen(messages, progress):  # raises with the traceback, if the process got as far as to send one
        pass
    raise RunError(f"a worker ended with status {process.exitcode}; out of memory? use --workers 1")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started within read that they have one thread, before torch is loaded in them."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
