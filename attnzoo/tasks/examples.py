"""What a retrieval task asks: a context, and questions about it whose answers are in it by construction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

Ids = tuple[int, ...]
"""Tokens."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """`prompt` asks, `lead` begins the answer without telling it, `answer` is what a right model goes on with.

    The first token of an answer is thus never predicted from a prompt whose state is still whole: at least the lead
    is read after compression. `places` are the positions in the context that the answer depends on.
    """

    prompt: Ids
    lead: Ids
    answer: Ids
    places: tuple[int, ...] = ()

    @property
    def tokens(self) -> Ids:
        """All of it, the answer given."""
        return self.prompt + self.lead + self.answer


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context (`body`) of a task, and questions about it that differ from one another."""

    task: str
    body: Ids
    questions: tuple[Question, ...]

    def translated(self, tokens: Sequence[int]) -> "Example":
        """The same example in other tokens: `tokens[t]` stands for t."""

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
    """(tokens, asked): questions and answers one after the other, and which tokens are answers."""
    tokens: list[int] = []
    asked: list[bool] = []
    for question in questions:
        tokens += question.tokens
        told = len(question.answer)
        asked += [False] * (len(question.tokens) - told) + [True] * told
    return tokens, asked
