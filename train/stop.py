"""Stops training early without losing work, after SIGTERM, SIGINT, SIGHUP, or the end of the launcher."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Launcher = tuple[int, int]
"""Process ids of DeepSpeed's launcher on this machine, and of the `deepspeed` command that started it."""


class StopRequest:
    """Makes `requested()` return True after a signal in SIGNALS, or after the `deepspeed` command has ended.

    launcher: the result of `find_launcher` at the start of the process. The deepspeed command does not forward SIGTERM
    but ends, and its ranks go on until they notice that. A second SIGINT interrupts at once. SIGHUP (a closed terminal)
    stays ignored if it was ignored before (nohup); after it, output to the terminal goes to /dev/null.
    """

    def __init__(self, launcher: Launcher | None = None) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._launcher = launcher

    def __enter__(self) -> "StopRequest":
        self._terminals = [descriptor for descriptor in (0, 1, 2) if _is_terminal(descriptor)]
        for number in SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether the run should finish its step, save and end."""
        if self.signal is None and self._launcher is not None and find_launcher() != self._launcher:
            self.signal = "loss of the launcher"
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.signal == "SIGINT":
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in self._terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        self.signal = name


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def find_launcher() -> Launcher | None:
    """The parent and grandparent process if they are DeepSpeed's launcher and its command; else None."""
    try:
        parent = psutil.Process(os.getppid())
        grandparent = psutil.Process(parent.ppid())
        if "deepspeed.launcher.launch" not in parent.cmdline():
            return None
        words = (
            grandparent.cmdline()
        )  # `deepspeed ...`, or `python -m deepspeed.launcher.runner ...` of `attnzoo train`
        by_name = any(os.path.basename(word).startswith("deepspeed") for word in words[:2])
        if not by_name and "deepspeed.launcher.runner" not in words:
            return None
    except psutil.Error:
        return None
    return parent.pid, grandparent.pid
