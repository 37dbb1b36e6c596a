"""Reads the letter in an answer, and joins several answers to one."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_NO_WORD = r"""\b(?!['’]\w|[-‐‑–]\w|\s+(?:vitamins?|cells?|lymphocytes?|coli|dimer|peptide)\b|\+(?!\w))"""
"""Letters that begin a word's name are no options: B-cells, C-reactive, D-dimer, vitamins, K+."""
_LETTER = (
    rf"""(?:\(([A-Za-z])\)|([B-HJ-Z]){_NO_WORD}|([AI])(?=\s*(?:$|[.,;:!?)\]}}*<"'»—–-]|\n)){_NO_WORD}"""
    r"""|([a-z])(?=[\s.*_`]*$))"""
)
"""(C), C, or c at the end. "The answer is A good night's sleep" and "... I think" name no option."""
_INSIDE = rf"""(?:([B-HJ-Zb-hj-z]){_NO_WORD}|([AIai])(?=\s*(?:$|[^\w\s'’]|['’](?!\w))){_NO_WORD})"""
"""A letter where the answer alone should stand. There, too, "A good night's sleep" is a text."""
_IS = r"(?:\s+(?:is|would be|should be))"
_OPENS = r"""[\s:=*_`"'“‘«<{\[]{0,9}"""
_OPTION = r"(?:[Oo]ption|OPTION|[Cc]hoice|CHOICE)"
MARKED = re.compile(
    rf"<(?:answer|Answer|ANSWER)>\W{{0,9}}(?:{_OPTION}\W{{0,9}})?{_INSIDE}[^<]*(?:</|$)"  # <answer>(C)</answer>
    rf"|\\boxed\{{\W{{0,9}}(?:\\(?:text|math)\w*\{{)?\W{{0,9}}(?:{_OPTION}\W{{0,9}})?{_INSIDE}"  # \boxed{C}
    rf"|\b(?:[Aa]nswer|ANSWER){_IS}?{_OPENS}(?:{_OPTION}\s+)?{_LETTER}"  # The answer is (C)
    rf"|\b(?:[Oo]ption|[Cc]hoice)(?:{_IS}|\s*:){_OPENS}{_LETTER}"  # The best option is (C)
)
BARE = re.compile(r"""[\s*_`"'“‘\[]*(?:\(([A-Za-z])\)|([A-Za-z])(?=\s*[):]|\s*\.(?!\w)|[\s*_`"'”’\]]*$))""")
"""An answer that begins with a letter: "(C)", "C", "C) Light in the morning"."""
_ALONE = r"""(?=\s*(?:$|[,;:!?)\]}*<"'&/+|\\]|\.(?!\s*[a-z])|\n|(?:and|or)\b))"""
SEVERAL = re.compile(
    r"(?:[)\]}*_`]|[^\S\n]){0,9}"
    r"(?:(?:,|/|&amp;|&|\+|;|\||\\(?:text\{)?|[-‐‑–—→~]"
    r"|\b(?:and|or|nor|to|through|then|vs|versus|as\s+well\s+as|perhaps|maybe|possibly|rather)\b)[\s*_`.}]{0,9}){1,4}"
    rf"(?:[Oo]ption\s+)?(?:\(([A-Za-z])\)|([A-Z]){_ALONE})"
    r"|[^\S\n]{1,9}([A-Z])(?=[.\s]*(?:$|[<}]))"
)
"""What follows a letter where an answer names several: "(A) or (B)", "A, B", "A-C", "A B"."""
LISTED = re.compile(r"^[\s*_`]*\(?([A-Z])[).:]", re.MULTILINE)
"""A line that begins with a letter: an answer with several of them repeats the options."""


def read_letter(answer: str, letters: Iterable[str]) -> str | None:
    """The letter that an answer gives: the last one that is marked as the answer; without a mark, the one that the
    answer begins with. None where there is none, where it is no letter of the question, and where the answer names
    several of its letters at once."""
    marked, known = list(MARKED.finditer(answer)), set(letters)
    bare = BARE.match(answer) if len(set(LISTED.findall(answer))) < 2 else None
    found = marked[-1] if marked else bare
    if found is None or found.lastindex is None:
        return None
    letter = found[found.lastindex].upper()
    also = SEVERAL.match(answer, found.end(found.lastindex))
    others = {(also[1] or also[2] or also[3]).upper()} & known - {letter} if also else set()
    return letter if letter in known and not others else None


def vote(given: Sequence[str | None]) -> tuple[str | None, bool]:
    """(the letter given most often, whether others were given as often). Of those it is the one that was given first.
    None where no answer could be read."""
    counts = Counter(letter for letter in given if letter is not None)
    if not counts:
        return None, False
    most = max(counts.values())
    return next(letter for letter in counts if counts[letter] == most), list(counts.values()).count(most) > 1


def likeliest(logprobs: Mapping[str, float], letters: Iterable[str]) -> str | None:
    """The letter with the most probability among a model's likeliest next tokens; None where none of them is a letter
    of the question. A letter that is not among them is less likely than every one that is."""
    mass: dict[str, float] = {}
    for token, value in logprobs.items():
        name = token.strip().rstrip(").:")
        if name in set(letters):
            mass[name] = mass.get(name, 0.0) + math.exp(value)
    return max(mass, key=lambda name: mass[name]) if mass else None
