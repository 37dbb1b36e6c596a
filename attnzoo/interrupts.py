"""Ctrl-C in the command `attnzoo`, also while Python imports. Imports no more than it needs: it comes first.

A KeyboardInterrupt inside an import is lost if the imported package catches it, or aborts the process if it passes
through C++. So the handler waits until the import is done.
"""

import os
import signal

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
AGAIN_SECONDS = 0.02
"""How often the handler looks whether the import is done."""


def end_at_once() -> bool:
    """Makes Ctrl-C end this process at once, without a word: for the time in which there is nothing to put away. Does
    nothing and returns False where something else handles it, or a shell has the command ignore it (cmd &)."""
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _interrupt):
        return False
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    return True


def end_in_order() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt: during an import when it is done, and a second one ends the process."""
    signal.signal(signal.SIGINT, _interrupt)


def raise_pending() -> None:
    """Raises KeyboardInterrupt if one waits. To be called before the process is replaced by another program."""
    if signal.getsignal(signal.SIGALRM) is _interrupt:
        _raise()


def _interrupt(number: int, frame: object) -> None:
    waits = signal.getsignal(signal.SIGALRM) is _interrupt
    if not _imports(frame):
        _raise()
    if waits and number == signal.SIGINT:
        os._exit(INTERRUPTED)
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


def _raise() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    raise KeyboardInterrupt


def _imports(frame: object) -> bool:
    """Whether an import runs in this frame or one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # type: ignore[attr-defined]
            return True
        frame = frame.f_back  # type: ignore[attr-defined]
    return False
