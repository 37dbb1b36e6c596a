"""Ends a run that hangs: every phase has a time limit, after which each rank prints its stacks and exits with status 1.

When a rank has stopped or a link is cut, the other ranks wait inside a collective, where Python handles no signals. So
a thread watches the time. Signals wake it through a file descriptor; a rank that does not end its phase within
`watchdog.stop` seconds after a signal is ended too. So is one whose later steps take that long: the signal may come
after what a step has to agree on, and then the next step waits for the rank that has stopped.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from train.config import WatchdogConfig
from train.stop import SIGNALS

POLL_SECONDS = 0.25
OTHERS_SECONDS = 3.0
"""Seconds between printing the stacks and exiting, so that the other ranks can print theirs."""
BACKSTOP_SECONDS = 30.0
"""If the thread cannot run because a library holds the GIL, faulthandler's timer ends the process so many seconds
later, with stacks but without a message."""


@dataclass
class _Phase:
    name: str
    limit: float | None
    deadline: float | None
    stopping: bool = False


class Watchdog:
    """The watchdog of a rank: a context manager for the main thread, which marks each phase with `phase`."""

    def __init__(self, limits: WatchdogConfig) -> None:
        self._limits = limits
        self._phase: _Phase | None = None
        self._told = False  # to stop, by a signal
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._wake, write = os.pipe()
        os.set_blocking(write, False)
        os.set_blocking(self._wake, False)
        self._previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._write = write
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        signal.set_wakeup_fd(self._previous)
        os.write(self._write, b"\0")
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._wake)
        os.close(self._write)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context for a phase with the limit `watchdog.<name>`; after it the outer phase's limit begins anew."""
        outer = self._phase
        self._begin(name)
        try:
            yield
        finally:
            self._begin(outer.name if outer is not None else None)

    def _begin(self, name: str | None) -> None:
        limit = None if name is None else getattr(self._limits, name)
        with self._lock:
            deadline = None if limit is None else time.monotonic() + limit
            self._phase = None if name is None else _Phase(name, limit, deadline)
            if self._told and name == "step":  # what is saved then takes the time that it takes
                self._shorten(self._phase)
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit + BACKSTOP_SECONDS, exit=True)

    def _watch(self) -> None:
        while not self._done.is_set():
            ready, _, _ = select.select([self._wake], [], [], POLL_SECONDS)
            numbers = os.read(self._wake, 512) if ready else b""
            if self._done.is_set():
                return
            if any(number in numbers for number in SIGNALS):
                self._hurry()
            with self._lock:
                phase = self._phase
                late = phase is not None and phase.deadline is not None and time.monotonic() > phase.deadline
            if late and phase is not None:
                self._end(phase)

    def _hurry(self) -> None:
        """After a signal: limits the rest of the present phase, and every later step, to `watchdog.stop` seconds."""
        with self._lock:
            self._told = True
            self._shorten(self._phase)

    def _shorten(self, phase: _Phase | None) -> None:
        limit = self._limits.stop
        if phase is None or limit is None or phase.stopping:
            return
        soon = time.monotonic() + limit
        if phase.deadline is None or soon < phase.deadline:
            phase.deadline, phase.stopping = soon, True

    def _end(self, phase: _Phase) -> None:
        rank = os.environ.get("RANK", "0")
        if phase.stopping:
            why = f"was told to stop and its phase {phase.name} did not end in {self._limits.stop:g} s (watchdog.stop)"
        else:
            why = f"its phase {phase.name} took longer than {phase.limit:g} s (watchdog.{phase.name})"
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        text = (
            f"train: rank {rank} on {socket.gethostname()}: {why}; a rank without such a message has stopped or cannot "
            f"be reached. Stacks of rank {rank}:\n{stacks}"
        )
        os.write(2, text.encode())
        time.sleep(OTHERS_SECONDS)
        os._exit(1)
