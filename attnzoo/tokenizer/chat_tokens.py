"""Conversations as token ids: control tokens where the chat template writes them, and nowhere else.

Other libraries encode the rendered text as one: `<|im_end|>` in a user's message ends the turn, and what follows can
speak for the system. Here a control token counts only where the template wrote all of its characters (see
`attnzoo.tokenizer.sourced`); what a message spells, alone or together with its neighbours, is text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnzoo.tokenizer.base import Tokenizer
from attnzoo.tokenizer.chat import ChatTemplate
from attnzoo.tokenizer.sourced import OWN, Sourced, own_of

_OWN = re.compile(re.escape(OWN) + b"+")


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
        return self._tokenizer.encode(text) if everywhere else self.encode_rendered(text)

    def encode_rendered(self, text: Sourced) -> list[int]:
        """Ids of a rendered conversation."""
        ids: list[int] = []
        at = 0
        for start, end, token in self._found(text):
            mark = self._marks[token]
            piece = text[at:start]
            ids += self._text(piece.rstrip() if mark.lstrip else piece, at)
            ids.append(token)
            at = end
            if mark.rstrip:
                at = len(text) - len(text[end:].lstrip())
        return ids + self._text(text[at:], at)

    def _text(self, text: str, at: int) -> list[int]:
        return self._tokenizer.encode_text(str.__str__(text), self.control, begins=at == 0) if text else []

    def _found(self, text: Sourced) -> Iterator[tuple[int, int, int]]:
        """(start, end, token) of the control tokens that the template wrote."""
        plain = str.__str__(text)
        for run in _OWN.finditer(own_of(text)):
            for match in self._pattern.finditer(plain, run.start(), run.end()):
                yield match.start(), match.end(), self._ids[match.group()]

    def _writes(self, spelling: str) -> bool:
        return spelling in self.template.source or spelling in self.template.special.values()
