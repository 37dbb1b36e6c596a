"""The processes of a Ray that this process started: who hears SIGTERM, who notices their end, who ends what is left."""

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
"""How long killed processes are waited for."""
NEEDED = ("gcs_server", "raylet")
"""Without these Ray is gone: whatever asks it for something waits a minute, and then Ray ends the process."""
PR_SET_CHILD_SUBREAPER = 36


class Node(Protocol):
    """What is used of Ray's object for the processes that `ray.init` started."""

    kill_all_processes: Callable[..., None]

    def dead_processes(self) -> Sequence[tuple[str, Any]]:
        """The names and handles of those that have ended by themselves."""


@contextmanager
def sigterm_held_back() -> Iterator[None]:
    """Holds SIGTERM back from this thread, and for good from the threads and processes that are started meanwhile.

    systemd, `timeout` and others send it to all processes of a service at once. Ray's would end on the spot, and the
    requests that run with them. So the command alone hears it, lets the requests finish, and then ends Ray.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class LocalRay:
    """Watches over the processes of `node`. When Ray ends by itself, the rest of them is ended and `lost` is called
    with the name of what ended first. In a thread, because whatever the main thread asks of Ray may take a minute."""

    def __init__(self, node: Node, lost: Callable[[str], None]) -> None:
        kill = node.kill_all_processes
        # They do not hear SIGTERM, so Ray need not wait a second for each of them to end by it.
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
        """Ends Ray by `shutdown` and returns when none of its processes is left."""
        self._stopped.set()
        self._thread.join()
        if not self._gone():  # else `shutdown` would wait for it
            shutdown()
        end_children()


def adopt_orphans() -> None:
    """Makes what this process started, directly or not, its children when their own parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kills what this process has started, directly or not, and waits until it has ended. Nobody is served any more."""
    family = psutil.Process().children(recursive=True)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=END_S)
