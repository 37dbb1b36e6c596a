"""A journal of what has been answered, one JSON object a line, so that an interrupted run goes on where it was."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from attnzoo.files import read_text, write_atomic
from scripts.exams.endpoint import STOP, is_logprob

MAX_BYTES = 1 << 30


class Journal:
    """The entries of a file by key; without a path they are kept in memory. The first line holds the settings that all
    entries belong to; a file of other settings is refused, never mixed.

    Each entry is on the disk before `add` returns. A last line that a crash left unfinished is dropped when the file is
    opened. what: whose answers these are, for messages.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], what: str = "an exam") -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.path, self._lock, self._file = path, threading.Lock(), -1
        if path is None:
            return
        lines = _read(path, what) if path.exists() else []
        head = json.loads(json.dumps(settings))
        if lines:
            _check_same(path, what, lines[0], head)
        self.entries = {line["key"]: line for line in lines[1:]}
        write_atomic(path, b"".join(map(_line, [head, *self.entries.values()])))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:  # a thread may still add what came late
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keeps an entry. Threads may call it side by side."""
        line = {"key": key, **entry}
        with self._lock:
            self.entries[key] = line
            if self._file >= 0:
                rest = _line(line)
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                os.fsync(self._file)


def _line(entry: Mapping[str, Any]) -> bytes:
    """ASCII, so that no line can end within a character."""
    return (json.dumps(entry) + "\n").encode("ascii")


def _read(path: Path, what: str) -> list[dict[str, Any]]:
    """The objects of the file, settings first. Raises ValueError for any other file."""
    content = read_text(path, MAX_BYTES)
    if not content:
        return []
    texts = content.split("\n")  # what follows the last newline is empty, or unfinished
    found: list[dict[str, Any]] = []
    for number, text in enumerate(texts[:-1] if len(texts) > 1 else texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or (found and not _is_entry(line)):
            raise ValueError(f"'{path}' is no journal of {what} (line {number}); name another file")
        found.append(line)
    return found


def _is_entry(line: Mapping[str, Any]) -> bool:
    """Whether a line has a key, and an answer: a text and how it ended, or log probabilities by token."""
    tokens = line.get("next_tokens")
    is_text = isinstance(line.get("text"), str) and isinstance(line.get("ended", STOP), str)
    is_answer = (is_text and isinstance(line.get("cut", False), bool)) or (
        isinstance(tokens, dict) and all(map(is_logprob, tokens.values()))
    )
    return isinstance(line.get("key"), str) and is_answer


def _check_same(path: Path, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"'{path}' belongs to {what} with {name}={found.get(name)!r}, not {wanted.get(name)!r}; "
                "name another file, or ask as before"
            )
