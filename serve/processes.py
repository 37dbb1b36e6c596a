"""The processes of a local Ray: keeps SIGTERM from them, notices when one ends, and ends those that are left."""

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import psutil

LOOK_S = 0.05
END_S = 5.0
"""Seconds to wait for killed processes."""
NEEDED = ("gcs_server", "raylet")
"""Ray does not work without these processes: calls to it then wait a minute, after which Ray ends the caller."""
PR_SET_CHILD_SUBREAPER = 36


class Node(Protocol):
    """The part of Ray's node object that `LocalRay` uses; it stands for the processes that `ray.init` has started."""

    kill_all_processes: Callable[..., None]

    def dead_processes(self) -> Sequence[tuple[str, Any]]:
        """(name, handle) of each process that has ended by itself."""


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Blocks SIGTERM in this thread, and permanently in the threads and processes that are started inside the context.

    systemd, `timeout` and others send SIGTERM to all processes of a service at once. It would end Ray's processes, and
    running requests with them. So only the command receives it, lets the requests finish, and then ends Ray.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LocalRay:
    """Watches the processes of `node` in a thread, because the main thread may be waiting for Ray. When a process in
    `NEEDED` ends by itself, the thread ends the others and calls `lost` with its name."""

    def __init__(self, node: Node, lost: Callable[[str], None]) -> None:
        kill = node.kill_all_processes
        # SIGTERM is blocked in them, so that Ray need not wait a second for each of them to end by it.
        node.kill_all_processes = lambda **_: kill(check_alive=False)
        self._node, self._lost = node, lost
        adopt_orphans()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not (self._stopped.wait(LOOK_S) or self._gone()):
            pass

    def _gone(self) -> bool:
        ended = [name for name, _ in self._node.dead_processes() if name in NEEDED]
        if ended:
            end_children()
            self._lost(ended[0])
        return bool(ended)

    def stop(self, shutdown: Callable[[], None]) -> None:
        """Ends Ray with `shutdown` and returns when all its processes have ended."""
        self._stopped.set()
        self._thread.join()
        if not self._gone():  # else `shutdown` would wait for it
            shutdown()
        end_children()


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kills all descendants of this process and waits up to `END_S` seconds for their end."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=END_S)
