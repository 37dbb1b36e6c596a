"""Whether a text holds anything that can be seen."""

import unicodedata

VISIBLE = ("L", "N", "P", "S")
"""Letters, numbers, punctuation and symbols; not marks, which need a letter, nor spaces, formats and controls."""
FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols of Unicode that are drawn as nothing."""


def is_blank(text: str) -> bool:
    """Whether a text is white space and invisible characters alone, such as U+200B and U+FEFF.

    >>> is_blank(" \\u200b\\n"), is_blank("\\u200b.")
    (True, False)
    """
    return not any(unicodedata.category(one)[0] in VISIBLE and one not in FILLERS for one in text)
