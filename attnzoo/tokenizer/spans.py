"""Where a text, or the messages of a conversation, stand among tokens, so that users name them and count no tokens."""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnzoo.attention.edits.spans import NoPlace
from attnzoo.tokenizer.base import Tokenizer
from attnzoo.tokenizer.chat import ChatTemplate
from attnzoo.types import PLACE

Interval = tuple[int, int]

MAX_MESSAGES = 64
"""Conversations of more messages have no names for them."""
NO_TEXT = b"\xff"
"""Stands for an embedding among the bytes of tokens: no text in UTF-8 has it, so that none is found across one."""
WAY_OUT = "name them by spans, as a text that stands in the prompt or as [start, stop) in tokens"
UNCERTAIN = (
    "the content of messages[{}] is empty, no text, written otherwise by the template, or stands elsewhere in the "
    "prompt too, such as in a control token; " + WAY_OUT
)
"""Said where a name is used whose tokens cannot be told."""


def token_spans(tokenizer: Tokenizer, ids: Sequence[int], value: Any, name: str) -> Any:
    """[start, stop) of all places where a text stands among the tokens; anything but a text as it is. Raises ValueError
    where it does not stand there."""
    if not isinstance(value, str):
        if not isinstance(value, Sequence) or not value:
            raise ValueError(
                f"spans[{name!r}]={value!r}: give a text of the prompt, [start, stop) in tokens, or several"
            )
        return value
    if not value:
        raise ValueError(f"spans[{name!r}] is an empty text; give words of the prompt, or leave the name out")
    found: list[Interval] = []
    for first, stop in _pieces(tokenizer, ids, value):
        if found and first < found[-1][1]:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((first, stop))
    if not found:
        raise ValueError(
            f"spans[{name!r}]={value!r} does not stand in the prompt; give its words as the prompt has them"
        )
    return found


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[Interval]:
    """The tokens of every place where a text stands."""
    spelled = [NO_TEXT if token == PLACE else tokenizer.token_bytes(token) for token in ids]
    ends = list(itertools.accumulate(map(len, spelled)))
    whole, wanted = b"".join(spelled), text.encode()
    return [
        (bisect.bisect_right(ends, at), bisect.bisect_left(ends, at + len(wanted)) + 1)
        for at in _all_places(whole, wanted)
    ]


def _all_places(whole: bytes, wanted: bytes) -> Iterator[int]:
    """Where it stands, also where one place begins within another: of those the next is a period further."""
    borders = _borders(wanted)
    period = len(wanted) - borders[-1] if wanted else 0
    at = whole.find(wanted) if wanted else -1
    while at >= 0:
        yield at
        at = at + period if whole.startswith(wanted, at + period) else whole.find(wanted, at + period + 1)


def _borders(text: bytes) -> list[int]:
    """How long the longest end of each beginning is that it begins with, too (Knuth, Morris and Pratt 1977)."""
    borders = [0] * len(text)
    for at in range(1, len(text)):
        length = borders[at - 1]
        while length and text[at] != text[length]:
            length = borders[length - 1]
        borders[at] = length + (text[at] == text[length])
    return borders


def message_spans(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tokens: Sequence[int]
) -> dict[str, list[Interval] | NoPlace]:
    """The tokens of contents by name: "messages[0]", ..., and by role those of all messages of the role.

    A name has a `NoPlace` where its tokens are not certain: where the template writes contents otherwise than they were
    given, but for white space around them, and for an empty one or one that is no text. Raises ValueError as the
    template does.
    """
    if len(messages) > MAX_MESSAGES:
        nowhere = NoPlace(f"conversations of more than {MAX_MESSAGES} messages have no names; {WAY_OUT}")
        return {name: nowhere for index, x in enumerate(messages) for name in (x["role"], f"messages[{index}]")}
    text = str.__str__(template.render(messages))
    found: dict[str, list[Interval] | NoPlace] = {}
    roles: dict[str, list[Interval] | NoPlace] = {}
    for index, (message, place) in enumerate(zip(messages, _places(template, messages, text), strict=True)):
        piece = None if place is None else _piece(tokenizer, tokens, text, *place)
        known = roles.setdefault(message["role"], [])
        found[f"messages[{index}]"] = [piece] if piece is not None else NoPlace(UNCERTAIN.format(index))
        if piece is None:
            roles[message["role"]] = known if isinstance(known, NoPlace) else NoPlace(UNCERTAIN.format(index))
        elif not isinstance(known, NoPlace):
            known.append(piece)
    return roles | found


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
    starts = list(_all_places(text.encode(), content.encode()))
    pieces = _pieces(tokenizer, tokens, content)
    return pieces[starts.index(len(text[:start].encode()))] if len(pieces) == len(starts) > 0 else None
