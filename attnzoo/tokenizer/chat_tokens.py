"""Conversations as token ids: control tokens where the chat template writes them, and nowhere else.

Other libraries encode the rendered text as one: `<|im_end|>` in a user's message ends the turn, and what follows can
speak for the system. Here a control token counts only where the template wrote all of its characters (see
`attnzoo.tokenizer.sourced`); what a message spells, alone or together with its neighbours, is text.
"""

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from attnzoo.tokenizer.base import Tokenizer
from attnzoo.tokenizer.chat import ChatTemplate
from attnzoo.tokenizer.sourced import OWN, Sourced, own_of

_OWN = re.compile(re.escape(OWN) + b"+")

MARK_LENGTH = 34
"""Characters of a mark."""


def new_mark() -> str:
    """A text that stands in a message for embeddings. It is drawn anew each time, so that no message can spell it."""
    return f"\ue000{secrets.token_hex(16)}\ue001"


def join_content(parts: Sequence[str], marks: Collection[str]) -> str:
    """The text of a message's content: a newline between two texts, as other servers write it, none around a mark."""
    text = ""
    for before, part in zip(["", *parts], parts, strict=False):
        text += f"\n{part}" if text and not {before, part} & set(marks) else part
    return text


class ChatEncoder:
    """A chat template and the tokenizer it writes for; `control`: ids of the control tokens. Threads may share one."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.template, self._tokenizer = template, tokenizer
        marks = tokenizer.marks()
        # Some vocabularies do not mark every token as special that their template builds turns of.
        self._marks = {t: m for t, m in marks.items() if m.control or (not m.is_word and self._writes(m.spelling))}
        self.control = frozenset(self._marks)
        spellings = sorted((re.escape(mark.spelling) for mark in self._marks.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(spellings) or r"(?!)")
        self._ids = {mark.spelling: token for token, mark in self._marks.items()}
        tokenizer.encode_text("a", self.control)  # builds what it caches now, not in the first request

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatEncoder | None":
        """The encoder of a tokenizer, None where it has no template. Raises ValueError as `ChatTemplate`."""
        template = ChatTemplate.of(tokenizer)
        return None if template is None else cls(template, tokenizer)

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, everywhere: bool = False
    ) -> list[int]:
        """Ids of a conversation. Raises ValueError as `ChatTemplate.render`.

        everywhere: control tokens wherever they are spelled, messages included, as in other libraries.
        """
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt)
        # The template writes the special tokens itself, the first one included.
        return self._piece(text, True, everywhere)

    def encode_around(self, text: Sourced, marks: Sequence[str], *, everywhere: bool = False) -> list[list[int]]:
        """Ids of a rendered conversation in pieces: before, between and after the `marks` in it (`new_mark`).

        Raises ValueError where the template does not write each mark once, in their order.
        """
        pieces = []
        for mark in marks:
            before, found, after = text.partition(mark)
            if not found or mark in after or any(other in before for other in marks):
                raise ValueError(
                    "the chat template leaves out, repeats or moves the contents of this conversation, so that "
                    "embeddings have no place in it; give them in another message"
                )
            pieces.append(before)
            text = after
        return [self._piece(piece, number == 0, everywhere) for number, piece in enumerate([*pieces, text])]

    def _piece(self, text: Sourced, begins: bool, everywhere: bool) -> list[int]:
        if not everywhere:
            return self.encode_rendered(text, begins=begins)
        return self._tokenizer.encode(text) if begins else self._tokenizer.encode_text(text, frozenset(), begins=False)

    def encode_rendered(self, text: Sourced, *, begins: bool = True) -> list[int]:
        """Ids of a rendered conversation. begins: whether the text is its beginning."""
        ids: list[int] = []
        at = 0
        for start, end, token in self._found(text):
            mark = self._marks[token]
            piece = text[at:start]
            ids += self._text(piece.rstrip() if mark.lstrip else piece, begins and at == 0)
            ids.append(token)
            at = end
            if mark.rstrip:
                at = len(text) - len(text[end:].lstrip())
        return ids + self._text(text[at:], begins and at == 0)

    def _text(self, text: str, begins: bool) -> list[int]:
        return self._tokenizer.encode_text(str.__str__(text), self.control, begins=begins) if text else []

    def _found(self, text: Sourced) -> Iterator[tuple[int, int, int]]:
        """(start, end, token) of the control tokens that the template wrote."""
        plain = str.__str__(text)
        for run in _OWN.finditer(own_of(text)):
            for match in self._pattern.finditer(plain, run.start(), run.end()):
                yield match.start(), match.end(), self._ids[match.group()]

    def _writes(self, spelling: str) -> bool:
        return spelling in self.template.source or spelling in self.template.special.values()
