"""How a run ends when it cannot go on: one line that says what is wrong and the way out, and an exit status."""

import errno
import importlib
import os
import shutil
import socket
import sys
import time
import traceback
from pathlib import Path

MISTAKE, FAILED = 2, 1
"""Exit statuses: something the user can mend before the run begins; something that went wrong in a run."""
PAUSE_SECONDS = 10.0
"""How long a rank waits before it tells what the first rank, or the rank that failed first, tells better: by then the
launcher has ended it."""


class TrainingError(RuntimeError):
    """A run that cannot go on; its text is one line for the user."""


class AgreedError(Exception):
    """What all ranks know to have gone wrong, and raise together, as `train.ranks.agree` does; the first tells it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int:
    """The exit status that `error` asks for."""
    return MISTAKE if isinstance(error, ValueError) else FAILED


def explain(error: BaseException) -> str:
    """One line for the user: the message, and for errors of the system the file and the way out."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    text = f"{where}{error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{text}; make space, or set run_dir and cache_dir to a larger disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return f"{text}; set run_dir and cache_dir to directories that this user may write to"
    return text


def make_directory(path: Path, key: str) -> None:
    """Makes the directory that the configuration's `key` names. Raises ValueError with the key when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be used as a directory: {explain(error)}") from None


def free_bytes(path: Path) -> int:
    """Bytes that may still be written where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank had ended: that rank has the real message."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "recv failed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def report(error: BaseException, joined: bool) -> int:
    """Tells what ended this rank, on stderr; returns the exit status.

    `joined`: the ranks know of each other. Before that every rank reads the same configuration, so the first one
    speaks; another is heard when it is still alive a moment later, that is when only it has the mistake.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    who = f"rank {rank} on {socket.gethostname()}: " if world > 1 else ""
    if isinstance(error, AgreedError):
        if rank == 0:
            _say(str(error))
        return error.status
    if isinstance(error, KeyboardInterrupt):
        if rank == 0:
            _say("interrupted; what was not saved is lost, the same command goes on from the last checkpoint")
        return 128 + 2
    if lost_rank(error):
        time.sleep(PAUSE_SECONDS)  # the rank that failed ends first, with its own exit status
        _say(f"{who}lost the connection to another rank, which has ended; its own message says why")
        return FAILED
    if not joined and rank != 0:
        time.sleep(PAUSE_SECONDS)
    if not isinstance(error, ValueError | TrainingError | OSError):
        traceback.print_exception(error)
        _say(f"{who}ended by {type(error).__name__}: {error}")
        return FAILED
    _say(f"{who if joined or rank != 0 else ''}{explain(error)}")
    return status_of(error)


def import_variants() -> None:
    """Imports the attention variants; a plug-in with a mistake ends the process with one line."""
    paths = os.environ.get("ATTNZOO_PLUGINS")
    try:
        importlib.import_module("attnzoo.attention")
    except Exception as error:
        if not paths:
            raise
        own = [f for f in traceback.extract_tb(error.__traceback__) if any(f.filename == p for p in _absolute(paths))]
        line = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        kind = "" if isinstance(error, ValueError) and not own else f"{type(error).__name__}: "
        if os.environ.get("RANK", "0") == "0":
            _say(f"a plug-in of ATTNZOO_PLUGINS={paths} cannot be imported: {kind}{error}{line}")
        raise SystemExit(MISTAKE) from None


def _absolute(paths: str) -> list[str]:
    return [str(Path(path).expanduser().resolve()) for path in paths.split(os.pathsep) if path]


def _say(text: str) -> None:
    """One line, written at once so that lines of several ranks do not mix."""
    os.write(2, f"train: {' '.join(text.split())}\n".encode())
    sys.stderr.flush()
