"""Jobs side by side: processes of one thread each, which take jobs from a queue, with one line of progress for all."""

import multiprocessing
import os
import signal
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
"""A job calls it after every step."""
Job = Callable[[Tick], Any]
"""Another process runs it: a function of a module, or `functools.partial` of one; its result is pickled, too."""


class JobError(RuntimeError):
    """A job failed; the message names it."""


@dataclass(frozen=True)
class _Message:
    """What a worker tells: steps done since the last message; at the end of a job `ended` with its result, or its
    problem."""

    name: str
    steps: int = 0
    ended: bool = False
    result: Any = None
    problem: str | None = None


def run_jobs(jobs: Mapping[str, Job], workers: int, progress: Progress) -> dict[str, Any]:
    """Results by name. Jobs begin in their order, `workers` at a time; with one worker, or one job, in this process.

    Raises JobError when a job fails; the others are ended.
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
    """A worker: does jobs until there are none. Ctrl-C reaches the whole group: the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (item := tasks.get()) is not None:
        name, job = item
        counter = _Counter(name, messages)
        try:
            result = job(counter.tick)
        except Exception:
            messages.put(_Message(name, problem=traceback.format_exc()))
            raise SystemExit(1) from None
        messages.put(_Message(name, counter.steps, ended=True, result=result))


class _Counter:
    """Tells the parent twice a second how many steps were done."""

    def __init__(self, name: str, messages: Any) -> None:
        self.name, self.messages, self.steps, self.sent = name, messages, 0, time.monotonic()

    def tick(self) -> None:
        self.steps += 1
        if time.monotonic() - self.sent > 0.5:
            self.messages.put(_Message(self.name, self.steps))
            self.steps, self.sent = 0, time.monotonic()


def _listen(messages: Any, progress: Progress, results: dict[str, Any]) -> bool:
    """Handles one message, if there is one soon. Raises JobError when it is of a failure."""
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
    while _listen(messages, progress, results):  # raises with the traceback, if the process got as far as to send one
        pass
    raise JobError(f"a worker ended with status {process.exitcode}; out of memory? use --workers 1")


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
