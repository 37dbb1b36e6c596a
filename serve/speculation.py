"""Drafts the next tokens of greedy sequences, so that one step computes several of them.

What followed the same few tokens earlier, in the prompt or in the text, is likely to follow again (prompt lookup,
Saxena 2023): copied names, quoted passages, code. The model reads the drafted tokens behind the last one in one pass,
and those that it would have chosen itself stay. The text is the one without drafts, but for rounding, which depends
on how many tokens are computed together.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models.sampling import greedy
from serve.request import Request
from serve.scheduling import StepPlan

MOST_ROWS = 4
"""Sequences that decode together while tokens are drafted for any of them. More of them fill the pass by themselves."""
REMEASURE = 64
"""Steps after which the other kind of step is measured anew."""
WEIGHT = 0.25
"""Weight of the newest measurement in the moving averages."""

Source = Callable[[Request, int], list[int]]
"""At most so many tokens that may follow the newest one of a request."""


class Speed:
    """Whether drafting pays, by the times of steps with drafts and without, each by their number of sequences."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, bool], float] = {}
        self._since: dict[tuple[int, bool], int] = {}

    def pays(self, rows: int, expected: float) -> bool:
        """Whether a step of so many sequences should draft if `expected` more tokens may come of it. Either kind of
        step that was not measured, or not for long, comes next."""
        for drafting in (False, True):
            if self._since.get((rows, drafting), REMEASURE) >= REMEASURE:
                return drafting
        plain, drafted = self._seconds[rows, False], self._seconds[rows, True]
        return drafted * rows < plain * (rows + expected)

    def measured(self, rows: int, drafting: bool, seconds: float) -> None:
        """Records the time of a step."""
        key, other = (rows, drafting), (rows, not drafting)
        before = self._seconds.get(key, seconds)
        self._seconds[key] = before + WEIGHT * (seconds - before)
        self._since[key] = 0
        self._since[other] = self._since.get(other, REMEASURE) + 1


class Speculation:
    """The drafts of one engine. most: tokens that are drafted for a sequence; 0: none. source: of the drafts."""

    def __init__(self, most: int, source: Source | None = None) -> None:
        self.most = most
        self.source = source or look_up
        self.speed = Speed()

    def drafts(self, plan: StepPlan, requests: Mapping[str, Request], room: int) -> dict[str, list[int]]:
        """What is drafted for the sequences of a step, by request; nothing where a prompt is read in it. room: tokens
        that the step has room for."""
        ids = plan.decoding
        if not self.most or plan.prefill or plan.resumed or not 0 < len(ids) <= MOST_ROWS:
            return {}
        found = {request_id: self._draft(requests[request_id], room // len(ids)) for request_id in ids}
        found = {request_id: tokens for request_id, tokens in found.items() if tokens}
        expected = sum(min(len(tokens), requests[name].drafts.expected) for name, tokens in found.items())
        return found if found and self.speed.pays(len(ids), expected) else {}

    def measured(
        self,
        plan: StepPlan,
        drafts: Mapping[str, Sequence[int]],
        sampled: Sequence[str],
        requests: Mapping[str, Request],
        seconds: float,
    ) -> None:
        """Notes what came of a step: whose tokens were sampled, once for each token, and the time it took."""
        rows = len(plan.decoding)
        if self.most and 0 < rows <= MOST_ROWS and not plan.prefill and not plan.resumed:
            self.speed.measured(rows, bool(drafts), seconds)
        counts = Counter(sampled)
        for request_id, tokens in drafts.items():
            requests[request_id].drafts.note(len(tokens), max(counts[request_id] - 1, 0))

    def _draft(self, request: Request, room: int) -> list[int]:
        cache = request.group
        usual = isinstance(cache, CacheChoice) and cache.exact and greedy(request.params.temperature)
        usual = usual and request.changes is None  # which are of one token
        if not usual or request.repeats or request.drafts.given_up:
            return []
        # The last token is not read, and memory is counted up to `request.room`.
        left = min(request.params.max_tokens - len(request.generated), request.room - request.context) - 1
        most = min(self.most, left, room)
        return self.source(request, most) if most > 0 else []


def look_up(request: Request, most: int) -> list[int]:
    """At most so many tokens that may follow, by the tokens of the sequence itself."""
    history, prompt = request.drafts.history, request.prompt
    known = len(history.tokens)
    history.extend(prompt[known:])
    history.extend(request.generated[max(known - len(prompt), 0) :])
    return history.draft(most)


def accepted(given: Sequence[int], best: Sequence[int | None]) -> int:
    """How many tokens of a row stay: the first, which is known, and those of the drafted ones behind it that the model
    chooses, too. best: what it chooses behind each; None: nothing, and its row says why."""
    right = (draft == chosen for draft, chosen in zip(given[1:], best, strict=False))
    return 1 + next((count for count, same in enumerate(right) if not same), len(given) - 1)
