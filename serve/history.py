"""The tokens of a sequence, what followed the newest ones before, and how often that was right."""

from collections.abc import Iterable
from dataclasses import dataclass, field

MOST_DRAFTED = 16
"""Most tokens that are drafted at once."""
LEAST_MATCH, MOST_MATCH = 3, 8
"""Tokens that must have stood before a place that is copied from, and those that are compared."""
PLACES = 8
"""Newest places that are compared."""
PATIENCE, LEAST_ACCEPTED = 8, 0.3
"""Nothing more is drafted for a sequence once fewer than this share stayed of its drafted tokens, in so many drafts."""
WEIGHT = 0.25
"""Weight of the newest draft in the expectation."""


class History:
    """The tokens of one sequence, in which is looked for what followed the newest ones before."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}
        """Of each run of `LEAST_MATCH` tokens, the place behind it."""
        self._earlier: list[int] = []
        """For each place, the one before it that follows the same run; 0: none."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens. Negative ones, which stand for embeddings, match nothing."""
        for token in tokens:
            self.tokens.append(token)
            run, place = tuple(self.tokens[-LEAST_MATCH:]), len(self.tokens)
            matches = len(run) == LEAST_MATCH and min(run) >= 0
            self._earlier.append(self._newest.get(run, 0) if matches else 0)
            if matches:
                self._newest[run] = place

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may follow: those behind the place whose tokens before it agree longest with the
        newest ones, of equal places the newest. Where that reaches the end, it goes on with what it drafts."""
        place = max(self._places(), key=self._agreement, default=0)
        if not place:
            return []
        told, found = self.tokens, list[int]()
        for at in range(place, place + most):
            token = told[at] if at < len(told) else found[at - len(told)]
            if token < 0:
                break
            found.append(token)
        return found

    def _places(self) -> list[int]:
        """Places behind the same run as the newest tokens, from the newest one on."""
        found, place = list[int](), self._earlier[-1] if self._earlier else 0
        while place and len(found) < PLACES:
            found.append(place)
            place = self._earlier[place - 1]
        return found

    def _agreement(self, place: int) -> int:
        most = min(MOST_MATCH, place)
        told = self.tokens
        return next((n for n in range(LEAST_MATCH, most) if told[place - 1 - n] != told[-1 - n]), most)


@dataclass
class Drafts:
    """What was drafted for one sequence. drafted, accepted: tokens; times: drafts; expected: tokens that the next draft
    may bring."""

    history: History = field(default_factory=History)
    drafted: int = 0
    accepted: int = 0
    times: int = 0
    expected: float = 1.0

    @property
    def given_up(self) -> bool:
        """Whether too few tokens stayed."""
        return self.times >= PATIENCE and self.accepted < LEAST_ACCEPTED * self.drafted

    def note(self, drafted: int, accepted: int) -> None:
        """Counts one draft."""
        self.times += 1
        self.drafted += drafted
        self.accepted += accepted
        self.expected += WEIGHT * (accepted - self.expected)
