"""Reads the letter in an answer, and joins several answers to one."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_LETTER = (
    r"""(?:\(([A-Za-z])\)|([B-HJ-Z])\b(?!['’]\w)|([AI])(?=\s*(?:$|[.,;:!?)\]}*<"'—–-]|\n))|([a-z])(?=[\s.*_`]*$))"""
)
"""(C), C, or c at the end. "The answer is A good night's sleep" and "... I think" name no option."""
_INSIDE = r"""(?:([B-HJ-Zb-hj-z])\b(?!['’]\w)|([AIai])(?=\s*(?:$|[^\w\s'’]|['’](?!\w))))"""
"""A letter where the answer alone should stand. There, too, "A good night's sleep" is a text."""
_IS = r"(?:\s+(?:is|would be|should be))"
_OPENS = r"""[\s:=*_`"'“‘\[]*"""
MARKED = re.compile(
    rf"<answer>\W*(?:[Oo]ption\W*)?{_INSIDE}[^<]*(?:</answer>|$)"  # <answer>(C)</answer>
    rf"|\\boxed\{{\W*(?:\\text\{{)?\W*{_INSIDE}"  # \boxed{C}
    rf"|\b(?:[Aa]nswer|ANSWER){_IS}?{_OPENS}(?:[Oo]ption\s+)?{_LETTER}"  # The answer is (C)
    rf"|\b(?:[Oo]ption|[Cc]hoice)(?:{_IS}|\s*:){_OPENS}{_LETTER}"  # The best option is (C)
)
BARE = re.compile(r"[\s*_`]*(?:\(([A-Za-z])\)|([A-Za-z])(?=\s*[):]|\s*\.(?!\w)|[\s*_`]*$))")
"""An answer that begins with a letter: "(C)", "C", "C) Light in the morning"."""
SEVERAL = re.compile(
    r"[)\]}\s*_`]*(?:,|/|&|\+|;|\b(?:and|or)\b)[\s*_`]*(?:(?:and|or)\s+)?(?:[Oo]ption\s+)?"
    r"""(?:\(([A-Za-z])\)|([A-Z])(?=\s*(?:$|[.,;:!?)\]}*<"'&/+]|\n|(?:and|or)\b)))"""
)
"""What follows a letter where an answer names several: "(A) or (B)", "A, B"."""
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
    others = {(also[1] or also[2]).upper()} & known - {letter} if also else set()
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
