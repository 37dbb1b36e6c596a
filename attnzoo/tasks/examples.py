"""The examples of retrieval tasks: a context, and questions whose answers it contains."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

Ids = tuple[int, ...]
"""Token ids."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a context. prompt: the question. lead: the beginning of the reply, without the answer. answer:
    the correct continuation. places: positions in the context that the answer depends on.

    The lead is read after the cache has been compressed, so that every answer token depends on the compressed state.
    """

    prompt: Ids
    lead: Ids
    answer: Ids
    places: tuple[int, ...] = ()

    @property
    def tokens(self) -> Ids:
        """The question, the lead and the answer."""
        return self.prompt + self.lead + self.answer


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context (`body`) of a task, and different questions about it."""

    task: str
    body: Ids
    questions: tuple[Question, ...]

    def translated(self, tokens: Sequence[int]) -> "Example":
        """The same example with token t replaced by `tokens[t]`."""

        def told(ids: Ids) -> Ids:
            return tuple(tokens[token] for token in ids)

        questions = (
            replace(q, prompt=told(q.prompt), lead=told(q.lead), answer=told(q.answer)) for q in self.questions
        )
        return replace(self, body=told(self.body), questions=tuple(questions))

    def after(self, begin: Ids) -> "Example":
        """The same example with tokens before its context."""
        questions = (replace(q, places=tuple(place + len(begin) for place in q.places)) for q in self.questions)
        return replace(self, body=begin + self.body, questions=tuple(questions))


def answered(questions: Sequence[Question]) -> tuple[list[int], list[bool]]:
    """(tokens, asked): all questions with their answers, concatenated, and whether each token belongs to an answer."""
    tokens: list[int] = []
    asked: list[bool] = []
    for question in questions:
        tokens += question.tokens
        told = len(question.answer)
        asked += [False] * (len(question.tokens) - told) + [True] * told
    return tokens, asked
