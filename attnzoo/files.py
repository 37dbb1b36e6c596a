"""Atomic writing: a reader sees the old content or the new one, never half of one."""

import os
import shutil
import tempfile
from pathlib import Path


def temporary_directory(final: Path) -> Path:
    """An empty directory beside `final`, on the same file system, so that a rename can move it there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))


def replace_directory(temporary: Path, final: Path) -> None:
    """Flushes `temporary` to disk and renames it to `final`; an existing `final` is moved aside first.

    What `final` holds is deleted: whether it may be is for the caller to know (`attnzoo.checkpoint.target`). A crash
    leaves either directory whole: between the two renames `final` is missing for a moment, and the old
    content stands beside it under a name that starts with a dot.
    """
    for path in sorted(temporary.rglob("*")):
        if path.is_file():  # safetensors writes files that only their owner can read
            os.chmod(path, path.stat().st_mode | 0o044)
        _flush(path)
    _flush(temporary)
    os.chmod(temporary, 0o755)  # mkdtemp makes directories that only their owner can read
    if not final.exists():
        os.rename(temporary, final)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
        os.rename(final, old / final.name)
        try:
            os.rename(temporary, final)
        except OSError:
            os.rename(old / final.name, final)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)
    _flush(final.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is either the old one or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
