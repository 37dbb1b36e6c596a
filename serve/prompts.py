"""Reads and checks prompts: texts, sequences of integer token ids, or token ids with embeddings between them."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnzoo.models.embedded import EmbeddedPrompt, token_ids
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from serve.request import ContextLengthError

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def read_prompts(prompts: Iterable[Any]) -> list[Prompt]:
    """A list of prompts: texts and `EmbeddedPrompt` as they are, token ids as lists. Raises ValueError for others."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts[:40]!r} is one text: give a list of prompts, [{prompts[:40]!r}]")
    kept = (str, EmbeddedPrompt)
    return [prompt if isinstance(prompt, kept) else _tokens(prompt, index) for index, prompt in enumerate(prompts)]


def _tokens(prompt: Any, index: int) -> list[int]:
    if not isinstance(prompt, bytes | bytearray | dict | set):
        try:
            return list(prompt)
        except TypeError:
            pass
    raise ValueError(f"prompts[{index}]={str(prompt)[:40]} is no prompt: give a text, or a list of token ids")


def whole(token: Any) -> int:
    """A token id as a Python int. Raises ValueError for booleans, floats and other types."""
    try:
        if not isinstance(token, bool):
            return operator.index(token)
    except TypeError:
        pass
    raise ValueError(f"prompt token {token!r} is no whole number; give the ids of tokens")


def as_prompt(prompt: Sequence[Any]) -> Sequence[int]:
    """Token ids as Python's ints; an `EmbeddedPrompt` as it is."""
    return prompt if isinstance(prompt, EmbeddedPrompt) else [whole(token) for token in prompt]


def check_prompt(prompt: Sequence[Any], vocabulary: int, width: int) -> None:
    """Raises ValueError for an empty prompt, a token id outside the vocabulary of `vocabulary` tokens, and embeddings
    that are not `width` numbers each."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if isinstance(prompt, EmbeddedPrompt):
        prompt.check_width(width)
    for token in token_ids(prompt):
        if not 0 <= whole(token) < vocabulary:
            raise ValueError(f"prompt token {token} is outside the vocabulary of {vocabulary}")


class PromptEncoder:
    """Texts and conversations as token ids. control_tokens: as in `serve.config.EngineConfig`. most: tokens of the
    context. Raises ValueError for a chat template that is damaged. Threads may share one."""

    def __init__(self, tokenizer: "Tokenizer", control_tokens: str, most: int) -> None:
        self.chat = ChatEncoder.of(tokenizer)
        self._tokenizer, self._control_tokens, self._most = tokenizer, control_tokens, most
        self._control = tokenizer.control_tokens() if self.chat is None else self.chat.control

    def text(self, prompt: str, bos: bool = True) -> list[int]:
        """Ids of a text, with the begin token if the model uses one and bos says so. Raises ContextLengthError for a
        text that must exceed the context, before encoding it."""
        self._check_length(prompt, 0)
        if self._control_tokens == "template_only":
            return [*self._tokenizer.encode("", bos=bos), *self._tokenizer.encode_text(prompt, self._control)]
        return self._tokenizer.encode(prompt, bos=bos)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], marks: Sequence[str] = (), embeddings: int = 0
    ) -> list[list[int]]:
        """Ids of a conversation up to the assistant's answer: what stands before, between and after `marks` in its
        messages. embeddings: how many will stand in their places.

        Raises ValueError without a chat template, or if it refuses the conversation; ContextLengthError as `text`.
        """
        if self.chat is None:
            raise ValueError("this model has no chat template; give a prompt instead of messages")
        text = self.chat.template.render(messages)
        plain = str.__str__(text)
        for mark in marks:
            plain = plain.replace(mark, "")
        self._check_length(plain, embeddings)
        return self.chat.encode_around(text, marks, everywhere=self._control_tokens == "everywhere")

    def _check_length(self, text: str, embeddings: int) -> None:
        least = self._tokenizer.least_tokens(text) + embeddings
        if least >= self._most:
            data = f" and {embeddings} embeddings" if embeddings else ""
            verb = "have" if embeddings else "has"
            raise ContextLengthError(
                f"this model's context is {self._most} tokens, and a text of {len(text)} characters{data} {verb} at "
                f"least {least}; shorten the prompt"
            )
