"""Reports why a run cannot go on, in one line, and chooses the exit status."""

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
"""Exit statuses: the user's mistake, found before the run begins; a failure of the run."""
PAUSE_SECONDS = 10.0
"""Seconds that a rank waits before it reports an error that another rank, which ends the run, explains better."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message is one line for the user."""


class AgreedError(Exception):
    """An error that all ranks raise together (see `train.ranks.agree`); rank 0 reports it. status: the exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int:
    """The exit status for an error."""
    return MISTAKE if isinstance(error, ValueError) else FAILED


def explain(error: BaseException) -> str:
    """The error as one line for the user; for an OSError with the file and advice."""
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
    """Makes the directory that the configuration key `key` names. Raises ValueError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be used as a directory: {explain(error)}") from None


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on, or will be on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended; that rank reports the cause."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "recv failed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def report(error: BaseException, joined: bool) -> int:
    """Prints to stderr why this rank ends; returns the exit status.

    joined: whether the ranks have joined their group. Before that all ranks usually find the same error, so that rank 0
    reports at once, and another rank only if it is still running after `PAUSE_SECONDS`.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    who = f"rank {rank} on {socket.gethostname()}: " if world > 1 else ""
    if isinstance(error, AgreedError):
        if rank == 0:
            _say(str(error))
        return error.status
    if isinstance(error, KeyboardInterrupt):
        if rank == 0:
            _say("interrupted; unsaved steps are lost; the same command resumes from the last checkpoint")
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
    """Imports the attention variants; a plug-in with an error ends the process with a message of one line."""
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
    """Prints one line in a single write, so that lines of several ranks do not mix."""
    os.write(2, f"train: {' '.join(text.split())}\n".encode())
    sys.stderr.flush()
