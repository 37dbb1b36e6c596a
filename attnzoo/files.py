"""Writes files and directories atomically (a reader sees the old content or the new one), and reads text and JSON."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_JSON = 64 << 20
"""Largest size of a JSON file, in bytes; the index of a model with a million tensors is smaller."""


def real_path(path: Path) -> Path:
    """The path with symbolic links resolved; a link to itself is kept, where `Path.resolve` raises RuntimeError."""
    return Path(os.path.realpath(path))


def user_path(path: str | Path, where: str) -> Path:
    """A path from user input, with ~ expanded to the home directory. Raises ValueError, naming the field `where`, for
    an empty text, which would be the working directory, for ~name of an unknown user, for a NUL character, and for a
    symbolic link that leads back to itself."""
    text = str(path)
    if not text:
        raise ValueError(f"{where}='' is empty; give a path")
    if "\0" in text:
        raise ValueError(f"{where}={text!r} contains a NUL character, which no path may; give another path")
    found = os.path.expanduser(text)
    if found.startswith("~"):
        name = text.partition("/")[0]
        raise ValueError(f"{where}={text!r}: there is no user {name!r}; write ./{text} for a file of that name")
    try:
        os.stat(found)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{where}={text!r} is a symbolic link that leads back to itself; give another") from None
    return Path(found)


def output_file(path: str | Path, where: str, others: Mapping[str, str | Path] | None = None) -> Path:
    """The path of a file that the user wants written, checked before any work is done. Only a regular file is replaced;
    of a symbolic link it is the file that it leads to (`write_atomic`). others: what else the user has named, by field.

    Raises ValueError, naming the field `where`, for an empty path and for `-`, for a device, a pipe, a directory and a
    read-only file, for a file in no directory or in one that takes no files, for a file that is also one of `others`,
    and as `user_path`.
    """
    named = f"{where}={str(path)!r}"
    if str(path) in ("", "-"):
        way = "write ./- for a file of that name" if str(path) else "give the path of a file"
        raise ValueError(f"{named} is not the path of a file, and reports do not go to stdout; {way}")
    found = user_path(path, where)
    real = real_path(found)
    try:
        mode = os.stat(found).st_mode if found.exists() else None
        if mode is not None:
            _check_kind(mode, named)
        for parent in real.parents:
            if parent.exists() and not parent.is_dir():
                raise ValueError(f"{named}: {str(parent)!r} is a file, not a directory; give another path")
        if not real.parent.exists():
            parent = real.parent if found.is_symlink() else found.parent
            raise ValueError(f"{named}: there is no directory {str(parent)!r}; make it, or give another path")
        if mode is not None and not (mode & 0o222 and os.access(real, os.W_OK)):  # root may write even without the bits
            raise ValueError(f"{named} is a read-only file; give another path, or make it writable")
        handle, probe = tempfile.mkstemp(prefix=f".{real.name}.", suffix=".tmp", dir=real.parent)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise ValueError(f"{named} cannot be written ({error.strerror}); give another path") from None
    for name, other in (others or {}).items():
        if real == _real_or_none(other):
            raise ValueError(f"{named} is also {name}, which would be lost; give another path")
    return found


def output_directory(path: str | Path, where: str) -> Path:
    """The path of a directory that the user wants files in, which need not exist yet, checked before any work is done.
    Raises ValueError, naming the field `where`, where files cannot be written below it, and as `user_path`."""
    named = f"{where}={str(path)!r}"
    if not str(path):
        raise ValueError(f"{named} is empty; give the path of a directory")
    found = user_path(path, where)
    try:
        there = next(each for each in (found.absolute(), *found.absolute().parents) if os.path.lexists(each))
        if not there.is_dir():
            raise ValueError(f"{named}: {str(there)!r} is not a directory; give another path")
        os.rmdir(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=there))
    except OSError as error:
        raise ValueError(f"{named} cannot be written ({error.strerror}); give another directory") from None
    return found


def _check_kind(mode: int, named: str) -> None:
    """Raises ValueError unless `mode` is that of a regular file. named: the path, for the message."""
    if stat.S_ISDIR(mode):
        raise ValueError(f"{named} is a directory; give the path of a file in it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{named} is a device or a pipe, which is not replaced; give another path")


def _real_or_none(path: str | Path) -> Path | None:
    """The real path; None for a text that is no path."""
    try:
        return real_path(Path(os.path.expanduser(path)))
    except (OSError, ValueError):
        return None


def home() -> Path:
    """The user's directory for models and caches: $ATTNZOO_HOME, else attnzoo in the user's cache directory. It may not
    exist yet. Raises the ValueError of `user_path`."""
    own = os.environ.get("ATTNZOO_HOME")
    if own:
        return user_path(own, "ATTNZOO_HOME")
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "attnzoo"


def temporary_directory(final: Path) -> Path:
    """Makes an empty directory beside `final`, on the same file system, so that a rename can move it to `final`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))


def replace_directory(temporary: Path, final: Path) -> None:
    """Flushes `temporary` to disk and renames it to `final`; an existing `final` is moved aside first, then deleted.

    The caller must know that the old content may be deleted (`attnzoo.checkpoint.target`). A crash leaves both
    directories whole: between the two renames `final` is missing for a moment, and the old content stands beside it
    under a name that starts with a dot.
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
    """Writes a file atomically: after a crash the file has its old content or `data`. A symbolic link stays, and the
    file that it leads to is replaced. Raises ValueError for a directory, a device and a pipe."""
    if path.exists():
        _check_kind(os.stat(path).st_mode, repr(str(path)))
    path = real_path(path)
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


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """The text in a file. Raises ValueError that names the file if it cannot be read, is not UTF-8 or has more than
    `limit` bytes; FileNotFoundError if it does not exist."""
    try:
        if not path.is_file() and path.exists() and not path.is_dir():
            raise ValueError(f"'{path}' is a pipe or a device, not a file")  # reading it might never end
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"'{path}' has more than {limit} bytes; is it the right file?")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 ({error}); copy it again") from None
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file '{path}'; give another path") from None
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises the errors of `read_text` and `parse_object`."""
    return parse_object(read_text(path), path)


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError that names the file `path` for any other content, and for a key that is
    set twice, because JSON readers differ in which of the two they take."""
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); copy it again") from None
    except RecursionError:
        raise ValueError(f"'{path}' is not JSON that can be read: it nests too deep; copy it again") from None
    except ValueError as error:  # numbers of too many digits, keys that are set twice
        raise ValueError(f"'{path}' is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, not an object; copy it again")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of (key, value) pairs, for `json.loads`. Raises ValueError for a key that is set twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        again = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"{again!r} is set twice; keep one of them")
    return content


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
