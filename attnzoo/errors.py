"""Messages for people: every error names the field, the value and the way out."""

import sys
from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown X" message: the nearest known name, and all known names.

    >>> suggest("rmah", ["mha", "rmha"])
    "; did you mean 'rmha'? known: mha, rmha"
    """
    names = sorted(known)
    if not names:
        return "; there are none"
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(names)}"


def complain(command: str, message: str, status: int = 2) -> int:
    """Says on stderr, in one line, why a command ends; returns its exit status, by default that of wrong usage. Every
    command does it by this function.

    command: as the user calls it, "attnzoo list".
    """
    print(f"{command}: error: {message}", file=sys.stderr, flush=True)
    return status
