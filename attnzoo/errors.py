"""Messages for people: every error names the field, the value and the way out."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown X" message: the nearest known name, and all known names.

    >>> suggest("rmah", ["mha", "rmha"])
    "; did you mean 'rmha'? known: mha, rmha"
    """
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(names)}"
