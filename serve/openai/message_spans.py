"""Where the messages of a conversation stand among its tokens, so that requests name them and count no tokens."""

from collections.abc import Mapping, Sequence

from attnzoo.generation import token_spans
from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.chat import ChatTemplate

Interval = tuple[int, int]

MAX_MESSAGES = 64
"""Conversations of more messages have no names for them."""


def message_spans(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], tokens: Sequence[int]
) -> dict[str, list[Interval]]:
    """The tokens of contents by name: "messages[0]", ..., and by role those of all messages of the role.

    A name is left out where its tokens are not certain: where the template writes contents otherwise than they were
    given, but for white space around them, and for an empty one. Raises ValueError as the template does.
    """
    if len(messages) > MAX_MESSAGES:
        return {}
    text = str.__str__(template.render(messages))
    found: dict[str, list[Interval]] = {}
    roles: dict[str, list[Interval] | None] = {}
    for index, (message, place) in enumerate(zip(messages, _places(template, messages, text), strict=True)):
        piece = None if place is None else _piece(tokenizer, tokens, text, *place)
        known = roles.setdefault(message["role"], [])
        if piece is None or known is None:
            roles[message["role"]] = None
        else:
            known.append(piece)
        if piece is not None:
            found[f"messages[{index}]"] = [piece]
    return found | {role: pieces for role, pieces in roles.items() if pieces}


def _places(
    template: ChatTemplate, messages: Sequence[Mapping[str, str]], text: str
) -> Sequence[tuple[int, str] | None]:
    """(where it begins, content) of every message in the rendered text; None for all where that cannot be told.

    The conversation is rendered once more with marks for contents: what stands around the marks must stand around the
    contents too.
    """
    nowhere = [None] * len(messages)
    marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
    try:
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        frame = str.__str__(template.render(marked))
    except ValueError:
        return nowhere
    places: list[tuple[int, str] | None] = []
    at = at_frame = 0
    for message, mark in zip(messages, marks, strict=True):
        around, cut, _ = frame[at_frame:].partition(mark)
        at, at_frame = at + len(around), at_frame + len(around) + len(mark)
        content = message["content"]
        content = content if text.startswith(content, at) else content.strip()
        if not cut or text[at - len(around) : at] != around or not text.startswith(content, at):
            return nowhere
        places.append((at, content))
        at += len(content)
    return places if text[at:] == frame[at_frame:] else nowhere


def _piece(tokenizer: Tokenizer, tokens: Sequence[int], text: str, start: int, content: str) -> Interval | None:
    """The tokens of the content that begins at `start`: it stands as often in the tokens as in the text."""
    starts, at = [], text.find(content) if content else -1
    while at >= 0:
        starts.append(at)
        at = text.find(content, at + len(content))
    if start not in starts:
        return None
    try:
        pieces = token_spans(tokenizer, tokens, content, "messages")
    except ValueError:
        return None
    return pieces[starts.index(start)] if len(pieces) == len(starts) else None
