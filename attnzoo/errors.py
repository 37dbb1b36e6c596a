"""Messages for people: every error names the field, the value and the way out."""

import contextlib
import sys
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


class OutputError(OSError):
    """What a command prints cannot be written: stdout is a file on a full disk, for example."""


class ChangedSourceWarning(UserWarning):
    """A plug-in's file is not the one that a checkpoint was written with."""


LONGEST_LIST = 2000
"""Characters of known names that a message lists; of more it lists the first `SOME`."""
SOME = 10


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown X" message: the nearest known name, and all known names.

    >>> suggest("rmah", ["mha", "rmha"])
    "; did you mean 'rmha'? known: mha, rmha"
    """
    names = sorted(known)
    if not names:
        return "; there are none"
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    told = ", ".join(names)
    if len(told) > LONGEST_LIST:
        told = f"{', '.join(names[:SOME])}, ... ({len(names):,} in all)"
    return f"{hint} known: {told}"


def harmless(text: str) -> str:
    """A text of others, such as a server's or a model's, with its control characters as escapes, so that no terminal
    obeys them; newlines and tabs stay. Halves of characters, which cannot be printed at all, are escapes too."""
    return "".join(repr(one)[1:-1] if _is_obeyed(one) else one for one in text)


OBEYED = ("Cc", "Cs", "Zl", "Zp")
"""Categories of control characters, of halves of characters, and of ends of lines that only some programs know."""
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Characters that turn what follows, so that a line says something else than is read."""


def _is_obeyed(one: str) -> bool:
    is_control = unicodedata.category(one) in OBEYED or unicodedata.bidirectional(one) in TURNING
    return is_control and one not in "\n\t"


def complain(command: str, message: str, status: int = 2) -> int:
    """Prints one line to stderr that says why a command ends, and returns the exit status `status` (2: wrong usage).
    Every command reports its errors through this function.

    command: the command as the user types it, for example "attnzoo list".
    """
    with contextlib.suppress(OSError):  # a full disk behind stderr changes no status
        line = harmless(" ".join(message.splitlines()))
        print(f"{command}: error: {line}", file=sys.stderr, flush=True)
    return status
