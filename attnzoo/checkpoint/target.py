"""Where a model may be written: replacing a directory deletes it, so that it must hold nothing but an earlier model.

Exports hold a list of their files with digests: files that were added or changed since are never deleted. Our own
format is recognised by "format" in its config.json and by its file names.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnzoo.files import replace_directory

MARKER = "attnzoo_export.json"
"""The file that lists which files an export has written, with their SHA-256."""
WRITER = "attnzoo"


def check_export_target(directory: Path) -> None:
    """Raises ValueError, naming what would be lost, unless an export may be written to `directory`.

    It may if nothing is there, into an empty directory, and over an earlier export that is unchanged.
    """
    entries = _entries(directory)
    if not entries:
        return
    files = _marked_files(directory / MARKER)
    if files is None:
        raise ValueError(f"{_holds(directory, entries)}, and no earlier export; give a new directory")
    _refuse_others(directory, entries, {MARKER, *files})
    for name, digest in files.items():
        path = directory / name
        if path.exists() and _digest(path) != digest:
            raise ValueError(
                f"'{path}' has changed since it was exported, and replacing '{directory}' would lose it; give a new "
                "directory"
            )


def place_export(temporary: Path, directory: Path) -> Path:
    """Moves `temporary` to `directory` as an export, and returns it. Raises ValueError as `check_export_target`."""
    check_export_target(directory)
    files = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    content = json.dumps({"written_by": WRITER, "files": files}, indent=2) + "\n"
    (temporary / MARKER).write_text(content, encoding="utf-8")
    replace_directory(temporary, directory)
    return directory


def check_native_target(directory: Path, *, config: str, format: str, names: Iterable[str]) -> None:
    """Raises ValueError, naming what would be lost, unless a model of our own format may be written to `directory`.

    It may if nothing is there, into an empty directory, and over an earlier model of that format: its file `config` has
    `format`, and all files are among `names`.
    """
    entries = _entries(directory)
    if not entries:
        return
    if _read_json(directory / config).get("format") != format:
        raise ValueError(f"{_holds(directory, entries)}, and no earlier model; give a new directory")
    _refuse_others(directory, entries, set(names))


def _entries(directory: Path) -> list[Path]:
    """The entries of a directory; empty where it does not exist. Raises ValueError for a file."""
    try:
        if directory.is_symlink():  # links were followed before, so this one leads nowhere
            raise ValueError(f"'{directory}' is a link to itself; give a directory")
        if not directory.exists():
            there = next(path for path in directory.absolute().parents if path.exists())
            if not there.is_dir():
                raise ValueError(f"'{directory}' lies in '{there}', which is a file; give another directory")
            return []
        if not directory.is_dir():
            raise ValueError(f"'{directory}' is a file; give a directory")
        return sorted(directory.iterdir())
    except OSError as error:
        raise ValueError(f"'{directory}' cannot be read ({error.strerror}); give another directory") from None


def _refuse_others(directory: Path, entries: Iterable[Path], ours: set[str]) -> None:
    others = [path for path in entries if path.name not in ours or path.is_symlink() or not path.is_file()]
    if others:
        raise ValueError(
            f"{_holds(directory, others)} beside the model, which replacing it would delete; move that away, or give a "
            "new directory"
        )


def _holds(directory: Path, entries: list[Path]) -> str:
    names = ", ".join(repr(path.name) for path in entries[:4])
    return f"'{directory}' holds {names}{f' and {len(entries) - 4} more' if len(entries) > 4 else ''}"


def _marked_files(marker: Path) -> dict[str, str] | None:
    content = _read_json(marker)
    files = content.get("files")
    if content.get("written_by") != WRITER or not isinstance(files, dict):
        return None
    # An export writes plain file names only; with any other name this is not a marker of ours.
    plain = all(isinstance(name, str) and name == Path(name).name for name in files)
    return {name: str(digest) for name, digest in files.items()} if plain else None


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is missing, unreadable or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
