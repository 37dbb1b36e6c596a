"""Asks the questions of an exam: rounds of sampled answers, orders of the options, and what came of them."""

import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

from attnzoo.intervals import wilson
from attnzoo.progress import Progress
from attnzoo.report import counted
from scripts.exams.answers import likeliest, read_letter, vote
from scripts.exams.endpoint import Answer, Endpoint, EndpointError, RefusedError, told_ends, way_out
from scripts.exams.journal import Journal
from scripts.exams.questions import Question

MODES = ("chat", "letters")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """mode: "chat" asks a chat model to reason and reads the letter in its answer; "letters" takes the letter that a
    model finds likeliest after "Answer: (", for small models that follow no instructions. rounds: answers of each
    question, of which the letter given most often counts (self-consistency). orders: orders of the options in which
    each question is asked; the first is the file's. tokens: most tokens of an answer. top: next tokens looked at."""

    mode: Literal["chat", "letters"] = "chat"
    rounds: int = 1
    temperature: float = 0.0
    tokens: int = 1024
    orders: int = 1
    seed: int = 0
    top: int = 20

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(MODES)}")
        for name in ("rounds", "orders", "tokens", "top"):
            if getattr(self, name) < 1:
                option = "max_tokens" if name == "tokens" else name  # what the user gave
                raise ValueError(f"{option}={getattr(self, name)} must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if self.mode == "letters" and (self.rounds > 1 or self.temperature > 0):
            raise ValueError("mode='letters' samples nothing; leave out rounds and temperature")
        if self.rounds > 1 and self.temperature == 0:
            raise ValueError(
                f"rounds={self.rounds} needs a temperature above 0, for example 0.7: at 0 all rounds are alike"
            )


@dataclass
class Answered:
    """What came of one question. by_order: the answers' letters as the file has them, for each order and round; None
    for an answer without a letter of the question, and for one that was cut: the last letter counts, and of a cut
    answer nobody knows the last one. cut: how those ended. failed: requests without an answer."""

    question: Question
    by_order: dict[int, list[str | None]] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    failed: int = 0
    cut: list[str] = field(default_factory=list)

    @property
    def letter(self) -> str | None:
        """The vote in the file's order."""
        return vote(self.by_order.get(0, []))[0]

    @property
    def tied(self) -> bool:
        """Whether the vote was decided by which letter came first."""
        return vote(self.by_order.get(0, []))[1]

    @property
    def agrees(self) -> bool:
        """Whether all orders lead to one letter."""
        return len({vote(given)[0] for given in self.by_order.values()} | {self.letter}) == 1 and bool(self.letter)


def take(
    endpoint: Endpoint,
    questions: Sequence[Question],
    settings: Settings,
    journal: Journal,
    parallel: int,
    failures: list[str] | None = None,
) -> list[Answered]:
    """Asks what the journal does not have yet, `parallel` requests at a time. What failed is not entered, so that it is
    asked again by the next run, and `failures` is given why. Ctrl-C waits for no answer. Raises ValueError where the
    endpoint refuses the first request."""
    if parallel < 1:
        raise ValueError(f"parallel={parallel} must be at least 1")
    asked = [
        (f"{question.id}|{order}|{turn}", question.reordered(order, settings.seed), turn)
        for question in questions
        for order in range(settings.orders)
        for turn in range(settings.rounds)
    ]
    left = [each for each in asked if each[0] not in journal.entries]
    progress, why = Progress(len(left)), [] if failures is None else failures

    def ask(key: str, question: Question, turn: int) -> None:
        journal.add(key, _asked(endpoint, question, settings, turn))

    for wave in (left[:1], left[1:]):  # a wrong name or key is known after one request
        with closing(_side_by_side([partial(ask, *each) for each in wave], parallel)) as ended:
            for error in ended:
                if _failed(error, may_be_refused=wave != left[:1]):
                    why.append(str(error))
                progress.add(1, f"{len(why)} failed" if why else "")
    progress.close()
    return results(questions, settings, journal)


def results(questions: Sequence[Question], settings: Settings, journal: Journal) -> list[Answered]:
    """What the journal says about each question."""
    found = []
    for question in questions:
        answered = Answered(question)
        for order in range(settings.orders):
            asked = question.reordered(order, settings.seed)
            for turn in range(settings.rounds):
                entry = journal.entries.get(f"{question.id}|{order}|{turn}")
                if entry is None:
                    answered.failed += 1
                    continue
                letter, end = _letter(entry, asked)
                answered.cut += [end] if end else []
                answered.by_order.setdefault(order, []).append(letter and asked.original(letter))
                if order == 0:
                    answered.texts.add(json.dumps(entry.get("text") or entry.get("next_tokens")))
        found.append(answered)
    return found


def rows(answered: Sequence[Answered], settings: Settings) -> list[dict[str, Any]]:
    """A row for all questions, and one for each group where there is more than one."""
    groups = sorted({each.question.group for each in answered})
    tables = [("all", answered)]
    if len(groups) > 1:
        tables += [(group or "(none)", [a for a in answered if a.question.group == group]) for group in groups]
    return [_row(name, each, settings) for name, each in tables]


def _row(name: str, answered: Sequence[Answered], settings: Settings) -> dict[str, Any]:
    counted = [each for each in answered if each.by_order.get(0)]
    right = sum(each.letter == each.question.answer for each in counted)
    low, high = wilson(right, len(counted))
    given = [letter for each in counted for letters in each.by_order.values() for letter in letters]
    row: dict[str, Any] = {
        "questions": name,
        "answered": len(counted),
        "right": right,
        "accuracy": right / len(counted) if counted else math.nan,
        "low": low,
        "high": high,
        "answers": len(given),
        "unread": given.count(None),
        "cut": sum(len(each.cut) for each in answered),
        "failed": sum(each.failed for each in answered),
    }
    if settings.rounds > 1:
        row["tied_votes"] = sum(each.tied for each in counted)
        row["texts_differ"] = sum(len(each.texts) > 1 for each in counted)
    if settings.orders > 1:
        row["orders_agree"] = sum(each.agrees for each in counted)
    return row


def unread_answers(answered: Sequence[Answered], most: int, path: Path | None) -> tuple[str, int]:
    """(what is wrong with answers and the way out, in words; exit status): that some were cut, or, with status 1, that
    none can be read. "" where neither is so. most, path: as of `scripts.exams.endpoint.way_out`."""
    given = [letter for each in answered for letters in each.by_order.values() for letter in letters]
    cut = [end for each in answered for end in each.cut]
    were = f"{'was' if len(cut) == 1 else 'were'} cut ({told_ends(cut)})" if cut else ""
    way = way_out(cut, most, path)
    if given and not any(given):
        also = f"; {len(cut):,} {were}" if cut else ""
        none = "none of the {:,} answers" if len(given) > 1 else "not the one answer"
        return f"{none.format(len(given))} holds a letter that can be read{also}; {way}", 1
    if not cut:
        return "", 0
    return f"{counted(len(cut), 'answer')} {were}, and {'counts' if len(cut) == 1 else 'count'} as unread; {way}", 0


def fingerprint(questions: Iterable[Question]) -> str:
    """Changes when a question, an option or a right answer does."""
    content = [[q.id, q.stem, list(q.options.items()), q.answer] for q in questions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _asked(endpoint: Endpoint, question: Question, settings: Settings, turn: int) -> dict[str, Any]:
    if settings.mode == "letters":
        return {"next_tokens": endpoint.next_tokens(question.beginning(), settings.top)}
    answer = endpoint.answer(
        question.prompt(), temperature=settings.temperature, max_tokens=settings.tokens, seed=settings.seed + turn
    )
    return answer.entry()


def _letter(entry: dict[str, Any], question: Question) -> tuple[str | None, str]:
    """(the letter, how the answer was cut; "" for a whole one)."""
    if "next_tokens" in entry:
        return likeliest(entry["next_tokens"], question.options), ""
    answer = Answer.of_entry(entry)
    return (None, answer.ended) if answer.is_cut else (read_letter(answer.text, question.options), "")


def _side_by_side(jobs: Sequence[Callable[[], None]], threads: int) -> Generator[BaseException | None, None, None]:
    """What each job raised, or None, as they end. Closed early, it begins no further job and waits for none: its
    threads, unlike a pool's, do not keep the process from ending while an endpoint hangs."""
    waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            try:
                job()
            except BaseException as error:
                ended.put(error)
            else:
                ended.put(None)

    try:
        for _ in range(min(threads, len(jobs))):
            Thread(target=work, daemon=True).start()
        for _ in jobs:
            yield ended.get()
    finally:
        while not waiting.empty():
            try:
                waiting.get_nowait()
            except Empty:
                break


def _failed(error: BaseException | None, *, may_be_refused: bool) -> bool:
    """Whether a request failed for a reason that concerns it alone. Raises every other error."""
    if error is None:
        return False
    if isinstance(error, EndpointError) or (may_be_refused and isinstance(error, RefusedError)):
        return True
    raise error
