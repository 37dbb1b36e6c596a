"""The run directory and the cache: one run at a time, seen by all ranks, with space for what will be written."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.report import counted
from train.config import Config
from train.digests import NAME as DIGESTS
from train.failures import explain, free_bytes, make_directory
from train.ranks import agree, decide, from_main, is_first

LOCK = ".lock"
GUARD = ".preparing"
OWNER = re.compile(r"host .*, pid \d+\n?\Z")
"""What a run writes into its lock, and what tells its directory from those of others."""
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
"""A network file system may show another host's new file only after a while."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the run directory for this process, and makes it; the system drops the lock with the process.

    Raises ValueError that names the host and process of a run that has it, or why it cannot be written.
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
        file.truncate()  # after the writing: a kill in between leaves a lock that still is a run's
        yield


def check_directories(config: Config) -> None:
    """Whether a run may write into run_dir and cache_dir; makes neither. Raises ValueError that names the way out."""
    for key, path in (("run_dir", config.run_path), ("cache_dir", config.cache_path)):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it will be made, or what it is in is refused below
        except OSError as error:
            raise ValueError(f"{key}={path} cannot be used as a directory: {explain(error)}") from None
        there = path
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise ValueError(
                f"{key}={path} cannot be used as a directory: {there} is none; set run_dir and cache_dir to "
                "directories that this user may write to"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"{key}={path} cannot be written to: {there} does not allow it; set run_dir and cache_dir to "
                "directories that this user may write to"
            )
    _check_owner(config.run_path)


def _check_owner(directory: Path) -> None:
    """Raises ValueError for files under the names that a run writes where no run was: they would be written over.

    A run leaves its lock there before anything else. A copy without hidden files is known by its checkpoints.
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
            f"run_dir={directory} holds {there[0]}, which no run of training has written and this one would write "
            "over; set another run_dir, or move the file away"
        )


def _holds(path: Path) -> bool:
    """Whether something would be lost there: an empty directory is nothing."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


@contextlib.contextmanager
def held(config: Config) -> Iterator[None]:
    """The run directory, held by the first rank while all ranks are inside, tidied up and seen by all of them."""
    with contextlib.ExitStack() as stack:
        decide(lambda: stack.enter_context(locked(config.run_path)))
        decide(lambda: _tidy_run(config.run_path))
        _check_shared(config.run_path, "run_dir")
        decide(lambda: make_directory(config.cache_path, "cache_dir"))
        _check_shared(config.cache_path, "cache_dir")
        yield


def _check_shared(directory: Path, key: str) -> None:
    """Whether every rank sees the directory of rank 0. Raises AgreedError that names the rank and host that do not."""
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
    """Removes what killed runs left half written. What a kill caught between the two renames of a swap comes back."""
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
    """Held while data are prepared (rank 0); where nobody else prepares any, what killed runs left is removed first."""
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


def check_space(config: Config, model_config: DecoderConfig) -> None:
    """Raises ValueError when keep + 1 checkpoints and an export do not fit beside what is there."""
    model, path = build_shapes(model_config), config.run_path
    one = checkpoint_bytes(config, model)
    there = sum(1 for _ in (path / "checkpoints").glob("step-*"))
    wanted = max(config.checkpoint.keep + 1 - there, 1)
    needed, free = wanted * one + 4 * model.num_parameters(), free_bytes(path)
    if needed > free:
        raise ValueError(
            f"run_dir={path}: {counted(wanted, 'checkpoint')} of {one / 2**20:,.0f} MiB and the export need "
            f"{needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free; make space, set run_dir to a larger "
            f"disk, or lower checkpoint.keep={config.checkpoint.keep}"
        )


def checkpoint_bytes(config: Config, model: DecoderLM) -> int:
    """Bytes of the tensors in one checkpoint over all ranks: weights, float32 masters where there are any, moments."""
    total = model.num_parameters()
    low = config.precision == "bf16"
    weights = (2 if low else 4) * total
    if config.lora.rank is not None:
        return weights  # what adapters add is small beside it
    matrices = sum(p.numel() for _, p in model.matrix_parameters()) if config.optim.name == "muon" else 0
    moments = 8 * (total - matrices) + 4 * matrices
    masters = 4 * total if low or config.zero.stage else 0
    return weights + masters + moments
