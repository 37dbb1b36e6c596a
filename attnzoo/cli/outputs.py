"""Options that name what a command writes: all of them are checked before the command does any work."""

import argparse
from pathlib import Path

from attnzoo.files import output_directory, output_file


class OutputFile(str):
    """The argparse type of an option that names a file to write."""


class OutputDirectory(str):
    """The argparse type of an option that names a directory to write files in."""


def check_outputs(options: argparse.Namespace) -> None:
    """Replaces every output in `options` by its path. Raises ValueError, naming the option, for one that cannot be
    written, and for a file that the command also reads or writes under another option."""
    given = dict(vars(options))
    for name, value in given.items():
        if isinstance(value, OutputFile):
            setattr(options, name, output_file(value, _option(name), _other_files(given, name)))
        elif isinstance(value, OutputDirectory):
            setattr(options, name, output_directory(value, _option(name)))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _other_files(given: dict[str, object], output: str) -> dict[str, str]:
    """The other values that name a file, by option or argument: files that exist, and other outputs."""
    found = {}
    for name, value in given.items():
        for entry in value if isinstance(value, list) else [value]:
            if name in (output, "command") or not isinstance(entry, str | Path):
                continue
            key, _, word = str(entry).partition("=") if isinstance(value, list) else (name, "", str(entry))
            if isinstance(entry, OutputFile):
                found[_option(name)] = str(entry)
            elif _is_file(word):
                found[key] = word
    return found


def _is_file(text: str) -> bool:
    """Whether there is a file of that name; a prompt, for example, may be no name at all."""
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long, NUL, an unknown user
        return False
