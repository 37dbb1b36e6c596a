"""Digests of a checkpoint's files: written beside them, and checked before the checkpoint is read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from attnzoo.files import write_atomic

NAME = "digests.json"
FORMAT = "attnzoo-digests-1"


def digest_files(directory: Path, share: int = 0, shares: int = 1) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files by name: of every `shares`-th file from number `share` on, so that ranks share work."""
    return {name: _digest(directory / name) for name in _names(directory)[share::shares]}


def write_digests(directory: Path, digests: dict[str, dict[str, Any]]) -> None:
    """Writes the digests that `check_files` reads."""
    content = {"format": FORMAT, "files": dict(sorted(digests.items()))}
    write_atomic(directory / NAME, (json.dumps(content, indent=1) + "\n").encode())


def check_files(directory: Path, share: int = 0, shares: int = 1) -> None:
    """Compares files with their digests, every `shares`-th one from number `share` on, and the list of files.

    Raises ValueError that names a file that is missing, unknown or changed.
    """
    expected = _read(directory)
    found = set(_names(directory))
    for name in sorted(expected.keys() | found):
        if name not in found:
            raise ValueError(f"{directory / name} is missing")
        if name not in expected:
            raise ValueError(f"{directory / name} is no file of this checkpoint")
    for name in sorted(expected)[share::shares]:
        size = (directory / name).stat().st_size
        if size != expected[name]["bytes"]:
            raise ValueError(f"{directory / name} has {size} bytes instead of {expected[name]['bytes']}")
        if _digest(directory / name) != expected[name]:
            raise ValueError(f"{directory / name} is not what was written: its digest differs")


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = content["files"]
        if content["format"] != FORMAT or not all(entry.keys() == {"bytes", "sha256"} for entry in files.values()):
            raise ValueError(f"not of format {FORMAT}")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, so nothing says whether the checkpoint is whole (an older version wrote none: begin a "
            "new run from its export by checkpoint.init_from)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return files


def _names(directory: Path) -> list[str]:
    """Names of the files below `directory`, without the digests and hidden files (of file systems and editors)."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if not path.is_dir())
    return sorted(p.as_posix() for p in paths if p.as_posix() != NAME and not p.name.startswith("."))


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
