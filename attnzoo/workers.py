"""Runs jobs in parallel: single-threaded worker processes take jobs from a queue and report progress together."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from queue import Empty
from typing import Any

from attnzoo.progress import Progress

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

Tick = Callable[[], None]
"""The function that a job calls after every step."""
Job = Callable[[Tick], Any]
"""A module-level function, or `functools.partial` of one. Jobs and their results are pickled."""


class JobError(RuntimeError):
    """A job failed; the message names it."""


@dataclass(frozen=True)
class _Message:
    """A worker's message to the parent. steps: done since its last message. ended: the job is done, and `result` is its
    result. problem: the traceback of a job that failed."""

    name: str
    steps: int = 0
    ended: bool = False
    result: Any = None
    problem: str | None = None


def run_jobs(jobs: Mapping[str, Job], workers: int, progress: Progress) -> dict[str, Any]:
    """Runs the jobs in their order, `workers` at a time, and returns their results by name. One worker, or a single
    job, runs in this process.

    Raises JobError when a job fails, after ending the others.
    """
    if workers > 1 and len(jobs) > 1:
        return _side_by_side(jobs, workers, progress)
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = job(partial(progress.add, 1, name))
        except Exception as error:
            raise JobError(f"{name} failed: {type(error).__name__}: {error}") from error
    return results


def _side_by_side(jobs: Mapping[str, Job], workers: int, progress: Progress) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    tasks, messages = context.Queue(), context.Queue()
    for item in [*jobs.items(), *[None] * workers]:
        tasks.put(item)
    processes = [context.Process(target=_work, args=(tasks, messages)) for _ in range(min(workers, len(jobs)))]
    results: dict[str, Any] = {}
    try:
        with _one_thread():
            for process in processes:
                process.start()
        while any(process.is_alive() for process in processes):
            _listen(messages, progress, results)
            for process in processes:
                if process.exitcode:
                    _failed(process, messages, progress, results)
        while _listen(messages, progress, results):
            pass
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
    return {name: results[name] for name in jobs}


def _work(tasks: Any, messages: Any) -> None:
    """The main function of a worker: runs jobs until none is left. It ignores Ctrl-C, which the parent handles, and
    gets SIGTERM when the parent is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(multiprocessing.parent_process(),), daemon=True).start()
    while (item := tasks.get()) is not None:
        name, job = item
        counter = _Counter(name, messages)
        try:
            result = job(counter.tick)
        except Exception:
            messages.put(_Message(name, problem=traceback.format_exc()))
            raise SystemExit(1) from None
        messages.put(_Message(name, counter.steps, ended=True, result=result))


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


class _Counter:
    """Counts a job's steps and sends the count to the parent twice a second."""

    def __init__(self, name: str, messages: Any) -> None:
        self.name, self.messages, self.steps, self.sent = name, messages, 0, time.monotonic()

    def tick(self) -> None:
        self.steps += 1
        if time.monotonic() - self.sent > 0.5:
            self.messages.put(_Message(self.name, self.steps))
            self.steps, self.sent = 0, time.monotonic()


def _listen(messages: Any, progress: Progress, results: dict[str, Any]) -> bool:
    """Handles the next message; returns False if none comes within 0.2 seconds. Raises JobError if a job has failed."""
    try:
        message: _Message = messages.get(timeout=0.2)
    except Empty:
        return False
    if message.problem is not None:
        raise JobError(f"{message.name} failed:\n{message.problem}")
    progress.add(message.steps, message.name)
    if message.ended:
        results[message.name] = message.result
    return True


def _failed(process: BaseProcess, messages: Any, progress: Progress, results: dict[str, Any]) -> None:
    while _listen(messages, progress, results):  # raises JobError with the traceback if the worker could send one
        pass
    raise JobError(f"a worker ended with status {process.exitcode}; out of memory? use --workers 1")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started inside this context use one thread: torch reads these variables when it is imported."""
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
