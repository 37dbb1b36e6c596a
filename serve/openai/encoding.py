"""Parses and encodes clients' texts in threads, so that they do not block the event loop.

The time grows with the text, and the event loop carries all streams. Short texts share several threads; long texts have
one thread of their own, so that they wait only for one another, and so have parts of messages that are no text. A text
that must exceed the context is refused before it is encoded (`PromptEncoder`).
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve.async_engine import AsyncEngine
from serve.openai.errors import ApiError
from serve.request import ContextLengthError

LONG = 20_000
"""A text with more characters or bytes is long."""
MAX_LONG = 32
"""Most long texts that may wait for their thread or be in it."""
Result = TypeVar("Result")


class _Lane:
    """One thread, and at most `MAX_LONG` works that wait for it or are in it. what: they are, for the refusal."""

    def __init__(self, name: str, what: str) -> None:
        self._thread, self._what = ThreadPoolExecutor(1, name), what
        self._waiting: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Raises ApiError 429 if too many wait."""
        if len(self._waiting) >= MAX_LONG:
            message = f"too many {self._what}; try again in a moment"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
        future = asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return await future


_SHORT = ThreadPoolExecutor(4, "attnzoo-short-text")
_LONG = _Lane("attnzoo-long-text", "long texts are being read")
_DATA = _Lane("attnzoo-data", "parts of messages are being encoded")


async def in_thread(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Runs `work(*arguments)` in a thread. size: length of the text in characters or bytes. Raises the errors of
    `work`, and ApiError 429 if too many long texts wait."""
    if size > LONG:
        return await _LONG.run(work, *arguments)
    return await asyncio.get_running_loop().run_in_executor(_SHORT, work, *arguments)


async def in_data_thread(work: Callable[..., Result], *arguments: Any) -> Result:
    """Runs `work(*arguments)`, which reads or encodes parts of messages, in their thread. Raises the errors of `work`,
    and ApiError 429 if too many wait."""
    return await _DATA.run(work, *arguments)


async def encode_text(text: str, engine: AsyncEngine, param: str, bos: bool = True) -> list[int]:
    """Token ids of a prompt. bos: with the begin token if the model uses one. Raises ApiError that names the field
    `param`."""
    try:
        return await in_thread(len(text), engine.engine.encoder.text, text, bos)
    except ContextLengthError as error:
        raise too_long(error, param) from None


def check_tokens(count: int, engine: AsyncEngine, param: str) -> None:
    """Raises ApiError if a prompt of `count` tokens leaves no room for an answer."""
    most = engine.engine.max_model_len
    if count >= most:
        message = f"this model's context is {most} tokens, but the prompt has {count}; shorten the prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def too_long(error: ContextLengthError, param: str) -> ApiError:
    """The ApiError for a ContextLengthError."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")
