"""Where a text, or the messages of a conversation, stand among tokens, so that users name them and count no tokens."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo.tokenizer.base import Tokenizer
from attnzoo.tokenizer.chat import ChatTemplate

Interval = tuple[int, int]

MAX_MESSAGES = 64
"""Conversations of more messages have no names for them."""


def token_spans(tokenizer: Tokenizer, ids: Sequence[int], value: Any, name: str) -> Any:
    """[start, stop) of all places where a text stands among the tokens; anything but a text as it is. Raises ValueError
    where it does not stand there."""
    if not isinstance(value, str):
        if not isinstance(value, Sequence) or not value:
            raise ValueError(
                f"spans[{name!r}]={value!r}: give a text of the prompt, [start, stop) in tokens, or several"
            )
        return value
    ends = list(itertools.accumulate(len(tokenizer.token_bytes(token)) for token in ids))
    whole, wanted, found = b"".join(map(tokenizer.token_bytes, ids)), value.encode(), []
    at = whole.find(wanted) if wanted else -1
    while at >= 0:
        first = bisect.bisect_right(ends, at)
        found.append((first, bisect.bisect_left(ends, at + len(wanted)) + 1))
        at = whole.find(wanted, at + len(wanted))
    if not found:
        raise ValueError(
            f"spans[{name!r}]={value!r} does not stand in the prompt; give its words as the prompt has them"
        )
    return found


def message_spans(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]
) -> dict[str, list[Interval]]:
    """The tokens of contents by name: "messages[0]", ..., and by role those of all messages of the role.

    A name is left out where its tokens are not certain: where the template writes contents otherwise than they were
    given, but for white space around them, and for an empty one or one that is no text. Raises ValueError as the
    template does.
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
    return {role: pieces for role, pieces in roles.items() if pieces} | found


def _places(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], text: str
) -> Sequence[tuple[int, str] | None]:
    """(where it begins, content) of every message in the rendered text, None for one whose content is no text; None for
    all where that cannot be told.

    The conversation is rendered once more with marks for contents: what stands around the marks must stand around the
    contents too.
    """
    nowhere = [None] * len(messages)
    given = [message.get("content") for message in messages]
    contents = [content if isinstance(content, str) else None for content in given]
    marks = [None if content is None else f"\ue000{index}\ue001" for index, content in enumerate(contents)]
    marked = [
        dict(message) if mark is None else {**message, "content": mark}
        for message, mark in zip(messages, marks, strict=True)
    ]
    try:
        frame = str.__str__(template.render(marked))
    except ValueError:
        return nowhere
    places: list[tuple[int, str] | None] = []
    at = at_frame = 0
    for content, mark in zip(contents, marks, strict=True):
        if mark is None or content is None:
            places.append(None)
            continue
        around, cut, _ = frame[at_frame:].partition(mark)
        at, at_frame = at + len(around), at_frame + len(around) + len(mark)
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
