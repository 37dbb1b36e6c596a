"""Checks and locks the run directory and the cache: one run at a time, visible to all ranks, with enough space."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from attnzoo.report import counted
from train.config import Config
from train.digests import NAME as DIGESTS
from train.failures import explain, free_bytes, make_directory
from train.optim import matrix_parameters
from train.ranks import agree, decide, from_main, is_first

LOCK = ".lock"
GUARD = ".preparing"
OWNER = re.compile(r"host .*, pid \d+\n?\Z")
"""The content of a run's lock file, which also identifies a directory as a run's."""
WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "samples.txt",
    "training.json",
    "loss.png",
    "checkpoints",
    "export",
    "tensorboard",
    "wandb",
)
SEEN_SECONDS = 10.0
"""Seconds to wait for another host's new file, which a network file system may show late."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes the run directory and locks it for this process; the system releases the lock when the process ends.

    Raises ValueError if another run has locked it (naming its host and process) or it cannot be written to.
    """
    make_directory(directory, "run_dir")
    try:
        file = os.fdopen(os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"run_dir={directory} cannot be written to: {explain(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run_dir={directory} is in use by another run ({file.read().strip() or 'which is starting'}); wait "
                "for it, stop it, or set another run_dir"
            ) from None
        except OSError as error:
            raise ValueError(
                f"run_dir={directory}: its file system has no locks ({error.strerror}), so two runs could damage each "
                "other; set run_dir to another one"
            ) from None
        file.seek(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
        file.truncate()  # last, so that a kill in between leaves content that `OWNER` matches
        yield


def check_directories(config: Config) -> None:
    """Raises ValueError if a run may not write into run_dir or cache_dir; does not make them."""
    for key, path in (("run_dir", config.run_path), ("cache_dir", config.cache_path)):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it will be made, or its parent is refused below
        except OSError as error:
            raise ValueError(f"{key}={path} cannot be used as a directory: {explain(error)}") from None
        there = path
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise ValueError(
                f"{key}={path} cannot be used as a directory: {there} is a file; set run_dir and cache_dir to "
                "directories"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"{key}={path} cannot be written to: {there} does not allow it; set run_dir and cache_dir to "
                "directories that this user may write to"
            )
        try:
            _try_to_write(there)
        except OSError as error:
            raise ValueError(f"{key}={path} cannot be used as a directory: {explain(error)}") from None
    _check_owner(config.run_path)


def _try_to_write(directory: Path) -> None:
    """Raises OSError if no file can be made in the directory. Nothing stays there. /proc, for one, allows root by its
    permissions what it then refuses."""
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600))  # a file without a name
    except OSError:  # also of file systems that know no such files
        os.rmdir(tempfile.mkdtemp(prefix=".attnzoo.", suffix=".tmp", dir=directory))


def _check_owner(directory: Path) -> None:
    """Raises ValueError if the directory is not a run's and has files that a run would overwrite.

    A run's directory has its lock file, or (a copy without hidden files) its checkpoints.
    """
    try:
        owner = (directory / LOCK).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        owner = ""
    except OSError as error:
        raise ValueError(f"run_dir={directory} cannot be used: {explain(error)}") from None
    if OWNER.match(owner) or (not owner and any((directory / "checkpoints").glob(f"step-*/{DIGESTS}"))):
        return
    there = [name for name in WRITTEN if _holds(directory / name)]
    if owner:
        there.append(LOCK)
    if there:
        raise ValueError(
            f"run_dir={directory} holds {there[0]}, which no training run has written and this one would "
            "overwrite; set another run_dir, or move the file away"
        )


def _holds(path: Path) -> bool:
    """Whether a file or a non-empty directory exists at `path`."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


@contextlib.contextmanager
def held(config: Config) -> Iterator[None]:
    """A context in which rank 0 has locked and cleaned up the run directory, and all ranks see it and the cache."""
    with contextlib.ExitStack() as stack:
        decide(lambda: stack.enter_context(locked(config.run_path)))
        decide(lambda: _tidy_run(config.run_path))
        _check_shared(config.run_path, "run_dir")
        decide(lambda: make_directory(config.cache_path, "cache_dir"))
        _check_shared(config.cache_path, "cache_dir")
        yield


def _check_shared(directory: Path, key: str) -> None:
    """Raises AgreedError that names a rank and its host if they do not see the directory of rank 0."""
    token = from_main(secrets.token_hex(8))
    mark = directory / f".seen-{token}"
    host = from_main(socket.gethostname())

    def leave() -> None:
        try:
            mark.write_text(token, encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{key}={directory} cannot be written to: {explain(error)}") from None

    decide(leave)

    def look() -> None:
        deadline = time.monotonic() + SEEN_SECONDS
        while not mark.is_file():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{key}={directory} is not the directory that rank 0 on {host} has under this name; all ranks need "
                    f"the same one: set {key} to an absolute path on a file system that all hosts share"
                )
            with contextlib.suppress(OSError):
                os.listdir(directory)  # makes a network file system ask its server again
            time.sleep(0.2)

    try:
        agree(look)
    finally:
        if is_first():
            mark.unlink(missing_ok=True)


def _tidy_run(directory: Path) -> None:
    """Removes files that killed runs left half written, and restores what was moved aside before a rename."""
    checkpoints = directory / "checkpoints"
    for place, names in ((directory, WRITTEN), (checkpoints, ("*",))):
        for name in names:
            for old in place.glob(f".{name}.*.old"):
                for inner in old.iterdir():
                    if not (place / inner.name).exists():
                        os.rename(inner, place / inner.name)
                shutil.rmtree(old, ignore_errors=True)
            _remove(place, f".{name}.*.tmp")
        _remove(place, ".seen-*")
    _remove(checkpoints, ".step-*.tmp")


@contextlib.contextmanager
def preparing(cache: Path) -> Iterator[None]:
    """A context for preparing data (rank 0). If no other process prepares any, it first cleans up after killed runs."""
    with (cache / GUARD).open("w") as guard:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for place in ("tokens", "tokenizers"):
                _remove(cache / place, ".*.tmp")
            _remove(cache, ".seen-*")
        fcntl.flock(guard, fcntl.LOCK_SH)
        yield


def _remove(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_space(config: Config, model: nn.Module) -> None:
    """Raises ValueError if the disk has no space for the export and for keep + 1 checkpoints, less those that exist."""
    path = config.run_path
    one = checkpoint_bytes(config, model)
    there = sum(1 for _ in (path / "checkpoints").glob("step-*"))
    wanted = max(config.checkpoint.keep + 1 - there, 1)
    needed, free = wanted * one + 4 * _size(model), free_bytes(path)
    if needed > free:
        raise ValueError(
            f"run_dir={path}: {counted(wanted, 'checkpoint')} of {one / 2**20:,.0f} MiB and the export need "
            f"{needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free; make space, set run_dir to a larger "
            f"disk, or lower checkpoint.keep={config.checkpoint.keep}"
        )


def checkpoint_bytes(config: Config, model: nn.Module) -> int:
    """Bytes of a checkpoint's tensors on all ranks: weights, float32 master copies if there are any, moments."""
    total = _size(model)
    low = config.precision == "bf16"
    weights = (2 if low else 4) * total
    if config.lora.rank is not None:
        return weights  # adapters and their states are small beside it
    matrices = sum(p.numel() for p in matrix_parameters(model)) if config.optim.name == "muon" else 0
    moments = 8 * (total - matrices) + 4 * matrices
    masters = 4 * total if low or config.zero.stage else 0
    return weights + masters + moments + 4 * total * (config.eval.keep_best or 0)


def _size(model: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
