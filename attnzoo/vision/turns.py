"""Questions about a picture as tokens: one picture, then turns of question and answer."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.chat_tokens import MARK_LENGTH
from attnzoo.types import CheckedConfig
from attnzoo.vision.questions import SceneQuestion

NO_TARGET = -100
MOST_PICTURES = 16
"""Pictures at the beginning of a conversation, at most."""


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

    @property
    def lead(self) -> str:
        """What stands before the text of an answer."""
        return self.reply.partition("{answer}")[0]

    @property
    def end(self) -> str:
        """What ends an answer."""
        return self.reply.partition("{answer}")[2]


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

    def _fitting(self, questions: Sequence[SceneQuestion]) -> Iterator[tuple[SceneQuestion, list[int], list[int]]]:
        """Questions as far as they fit behind the picture, with what `_turn` says of them. Raises ValueError where not
        even the first one does."""
        used = len(self.begin)
        for number, question in enumerate(questions):
            asked, reply = self._turn(number, question)
            used += len(asked) + len(reply)
            if self.longest is not None and used > self.longest:
                if number:
                    return
                raise ValueError(
                    f"the picture with the question {question.text!r} and its answer takes {used} tokens, and "
                    f"{self.longest} fit"
                )
            yield question, asked, reply

    def sequence(self, questions: Sequence[SceneQuestion]) -> tuple[list[int], list[int]]:
        """(tokens, targets) of the picture and all questions with their answers; targets are the next tokens of
        answers, -100 elsewhere."""
        tokens: list[int] = list(self.begin)
        told = [False] * len(tokens)
        for _, asked, reply in self._fitting(questions):
            tokens += [*asked, *reply]
            told += [False] * len(asked) + [True] * len(reply)
        targets = [token if known else NO_TARGET for token, known in zip(tokens[1:], told[1:], strict=True)]
        return tokens[:-1], targets

    def ends(self, questions: Sequence[SceneQuestion], words: Mapping[str, int]) -> list[tuple[int, int]]:
        """(place in the tokens of `sequence`, number of the word in `words`) wherever one of these words ends in a
        question or an answer."""
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
        found: list[tuple[int, int]] = []
        place = len(self.begin)
        for question, asked, reply in self._fitting(questions):
            parts = (
                self.texts.ask.replace("{question}", question.text),
                self.texts.reply.replace("{answer}", question.answer),
            )
            # What stands between turns comes first in `asked`.
            starts = (place + len(asked) - len(self.encode(parts[0])), place + len(asked))
            for start, text in zip(starts, parts, strict=True):
                for word in pattern.finditer(text):
                    # A text up to the end of a word has the tokens that the whole text begins with.
                    found.append((start + len(self.encode(text[: word.end()])) - 1, words[word.group()]))
            place += len(asked) + len(reply)
        return found


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(tokens_BT, targets_BT), int64, padded at the end, where nothing that counts sees it."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    targets_BT = torch.full((len(rows), longest), NO_TARGET)
    for row, (tokens, targets) in enumerate(rows):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        targets_BT[row, : len(targets)] = torch.tensor(targets)
    return tokens_BT, targets_BT


def chat_tokenizer(tokenizer: Tokenizer, texts: TurnFormat) -> Tokenizer:
    """The tokenizer with a chat template that writes conversations as turns: marks of pictures (`chat_tokens.new_mark`)
    at the beginning of a user's message stand before its question. What ends an answer ends a text."""
    found = copy.copy(tokenizer)
    begins = tokenizer.bos_id is not None and tokenizer.encode("", bos=True) == [tokenizer.bos_id]
    found.chat_template = _template(texts, begins)
    found.stop_ids = tokenizer.stop_ids | set(tokenizer.encode(texts.end)[:1])
    return found


def _template(texts: TurnFormat, begins: bool) -> str:
    """Jinja. begins: a text begins with the begin token."""
    asked, then = map(ascii, texts.ask.split("{question}"))
    before = f"bos_token ~ {texts.before!a}" if begins else ascii(texts.before)
    last = MARK_LENGTH - 1
    is_mark = f"m.content[s.at:s.at+1] == '\\ue000' and m.content[s.at+{last}:s.at+{MARK_LENGTH}] == '\\ue001'"
    return f"""
{{%- if add_generation_prompt and messages and messages[-1].role != 'user' -%}}
{{{{- raise_exception('the last message must be of the role user') -}}}}
{{%- endif -%}}
{{%- set s = namespace(at=0) -%}}
{{%- for m in messages -%}}
{{%- if m.role != ('user', 'assistant')[loop.index0 % 2] -%}}
{{{{- raise_exception('messages must be of the roles user and assistant in turn: the model has learned no others') -}}}}
{{%- elif m.role == 'user' -%}}
{{%- set s.at = 0 -%}}
{{%- for _ in range({MOST_PICTURES}) -%}}
{{%- if {is_mark} -%}}{{%- set s.at = s.at + {MARK_LENGTH} -%}}{{%- endif -%}}
{{%- endfor -%}}
{{{{- {before} if loop.first else {texts.between!a} -}}}}
{{{{- m.content[:s.at] ~ {asked} ~ m.content[s.at:] ~ {then} -}}}}
{{%- else -%}}
{{{{- {texts.lead!a} ~ m.content ~ {texts.end!a} -}}}}
{{%- endif -%}}
{{%- endfor -%}}"""
