"""Questions about a picture as tokens: one picture, then turns of question and answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attnzoo.tokenizer import Tokenizer
from attnzoo.types import CheckedConfig
from attnzoo.vision.questions import SceneQuestion

NO_TARGET = -100


@dataclass(frozen=True, kw_only=True)
class TurnFormat(CheckedConfig):
    """The texts around pictures, questions and answers; spellings of control tokens are these tokens. before: what
    stands before the picture. ask: a question, with {question}. reply: an answer, with {answer} and what ends it.
    between: what stands between turns."""

    before: str = ""
    ask: str = "Q: {question} A:"
    reply: str = " {answer}\n"
    between: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, slot in (("ask", "{question}"), ("reply", "{answer}")):
            if getattr(self, name).count(slot) != 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must hold {slot} once")


class Turns:
    """Makes token ids of pictures' questions. image_token: the placeholder, `places` of them for a picture. longest:
    tokens that a sequence may have; turns that do not fit are left out.

    Raises ValueError where not even one question fits.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: TurnFormat, *, image_token: int, places: int, longest: int | None = None
    ) -> None:
        self.texts, self.longest = texts, longest
        self.encode = cache(tokenizer.encode)
        self.begin = (*tokenizer.encode(texts.before, bos=True), *[image_token] * places)
        if not tokenizer.encode(texts.before, bos=True):
            raise ValueError("before: a sequence must not begin with the picture; give a text or a begin token")
        shortest = len(self.begin) + len(self.encode(texts.ask)) + len(self.encode(texts.reply))
        if longest is not None and shortest > longest:
            raise ValueError(f"a picture and one question take {shortest} tokens or more, and {longest} fit")

    def prompt(self, question: str) -> list[int]:
        """The picture and one question, to be answered."""
        return [*self.begin, *self.encode(self.texts.ask.replace("{question}", question))]

    def reply(self, answer: str) -> list[int]:
        """The tokens of an answer and of its end."""
        return self.encode(self.texts.reply.replace("{answer}", answer))

    def words(self, questions: Sequence[SceneQuestion]) -> list[int]:
        """The tokens of turns without a picture."""
        turns = [token for number, each in enumerate(questions) for part in self._turn(number, each) for token in part]
        return [*self.encode(self.texts.before, bos=True), *turns]

    def _turn(self, number: int, question: SceneQuestion) -> tuple[list[int], list[int]]:
        """(what is asked, what is answered) in a turn that follows `number` others."""
        between = self.encode(self.texts.between) if number else []
        asked = self.encode(self.texts.ask.replace("{question}", question.text))
        return [*between, *asked], self.reply(question.answer)

    def sequence(self, questions: Sequence[SceneQuestion]) -> tuple[list[int], list[int]]:
        """(tokens, targets) of the picture and all questions with their answers; targets are the next tokens of
        answers, -100 elsewhere."""
        tokens: list[int] = list(self.begin)
        told = [False] * len(tokens)
        for number, question in enumerate(questions):
            asked, reply = self._turn(number, question)
            if self.longest is not None and len(tokens) + len(asked) + len(reply) > self.longest:
                break
            tokens += [*asked, *reply]
            told += [False] * len(asked) + [True] * len(reply)
        targets = [token if known else NO_TARGET for token, known in zip(tokens[1:], told[1:], strict=True)]
        return tokens[:-1], targets


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT), int64, padded at the end, where nothing that counts sees it."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    targets_BT = torch.full((len(rows), longest), NO_TARGET)
    for row, (tokens, targets) in enumerate(rows):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        targets_BT[row, : len(targets)] = torch.tensor(targets)
    return tokens_BT, targets_BT
