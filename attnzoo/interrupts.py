"""Ctrl-C in the command `attnzoo`, also while Python imports. Imports no more than it needs: it comes first.

A KeyboardInterrupt inside an import is lost if the imported package catches it, and aborts the process if it passes
through C++. So there the handler ends the process.
"""

import contextlib
import os
import signal

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
_words = ""


def say(words: str) -> None:
    """Sets the line that Ctrl-C prints to stderr from now on; "": none. A command says here what it keeps."""
    global _words
    _words = words


def tell() -> None:
    """Prints the line that `say` has set, by no more than a system call: it may be within an import."""
    if _words:
        with contextlib.suppress(OSError):  # a full disk behind stderr changes no status
            os.write(2, f"{_words}\n".encode("utf-8", "replace"))


def end_at_once() -> bool:
    """Makes Ctrl-C end this process at once: for the time in which there is nothing to put away. Does nothing and
    returns False where something else handles it, or a shell has the command ignore it (cmd &)."""
    if signal.getsignal(signal.SIGINT) not in (signal.default_int_handler, _interrupt):
        return False
    signal.signal(signal.SIGINT, lambda *_: _end())
    return True


def end_in_order() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt, so that what a command holds is put away; in an import it ends at once."""
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    if _imports(frame):
        _end()
    raise KeyboardInterrupt


def _end() -> None:
    tell()
    os._exit(INTERRUPTED)


def _imports(frame: object) -> bool:
    """Whether an import runs in this frame or one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # type: ignore[attr-defined]
            return True
        frame = frame.f_back  # type: ignore[attr-defined]
    return False
