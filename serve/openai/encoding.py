"""Parses and encodes clients' texts in threads, so that they do not block the event loop.

The time grows with the text, and the event loop carries all streams. Short texts share several threads; long texts have
one thread of their own, so that they wait only for one another. A text that must exceed the context is refused before
it is encoded (`Engine.encode`).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve.async_engine import AsyncEngine
from serve.openai.errors import MAX_QUOTED, ApiError
from serve.request import ContextLengthError

LONG = 20_000
"""A text with more characters or bytes is long."""
MAX_LONG = 32
"""Most long texts that may wait for their thread or be in it."""
MESSAGE_CHARACTERS = 16
"""Characters added to a message's length, because the chat template writes its role and its end."""

_SHORT = ThreadPoolExecutor(4, "attnzoo-short-text")
_LONG = ThreadPoolExecutor(1, "attnzoo-long-text")
_waiting: set[asyncio.Future[Any]] = set()

Result = TypeVar("Result")


async def in_thread(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Runs `work(*arguments)` in a thread. size: length of the text in characters or bytes. Raises the errors of
    `work`, and ApiError 429 if too many long texts wait."""
    loop = asyncio.get_running_loop()
    if size <= LONG:
        return await loop.run_in_executor(_SHORT, work, *arguments)
    if len(_waiting) >= MAX_LONG:
        message = "too many long texts are being read; try again in a moment"
        raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
    future = loop.run_in_executor(_LONG, work, *arguments)
    _waiting.add(future)
    future.add_done_callback(_waiting.discard)
    return await future


async def encode_text(text: str, engine: AsyncEngine, param: str) -> list[int]:
    """Token ids of a prompt. Raises ApiError that names the field `param`."""
    try:
        return await in_thread(len(text), engine.engine.encode, text)
    except ContextLengthError as error:
        raise too_long(error, param) from None


async def encode_chat(messages: Sequence[Mapping[str, str]], engine: AsyncEngine, param: str) -> list[int]:
    """Token ids of a conversation. Raises ApiError that names the field `param`."""
    most = engine.engine.max_model_len
    if len(messages) > most:
        message = f"{param} holds {len(messages)} messages, and this model's context is {most} tokens; send fewer"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    size = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in messages)
    try:
        return await in_thread(size, engine.engine.encode_chat, messages)
    except ContextLengthError as error:
        raise too_long(error, param) from None
    except ValueError as error:
        raise ApiError(400, str(error)[:MAX_QUOTED], param=param, code="chat_template_error") from None


def check_tokens(count: int, engine: AsyncEngine, param: str) -> None:
    """Raises ApiError if a prompt of `count` tokens leaves no room for an answer."""
    most = engine.engine.max_model_len
    if count >= most:
        message = f"this model's context is {most} tokens, but the prompt has {count}; shorten the prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def too_long(error: ContextLengthError, param: str) -> ApiError:
    """The ApiError for a ContextLengthError."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")
