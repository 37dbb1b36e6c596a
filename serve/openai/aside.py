"""Work on what a client sent, away from the event loop and within bounds.

Rendering and encoding take time that grows with the text, and the loop carries everybody's streams. So both happen in
threads: short texts in some, long ones in one of their own, so that whoever sends books waits for books. What the model
could not read in any case is refused before (`Engine.encode`): no token stands for more than the longest one does.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve.async_engine import AsyncEngine
from serve.openai.errors import MAX_QUOTED, ApiError
from serve.request import ContextLengthError

LONG = 20_000
"""Characters or bytes from which on a text is a long one."""
MAX_LONG = 32
"""Long texts that may wait for their thread."""
MESSAGE_CHARACTERS = 16
"""What a message of a conversation counts for, however empty it is: templates write its role and its end."""

_SHORT = ThreadPoolExecutor(4, "attnzoo-short-text")
_BOOKS = ThreadPoolExecutor(1, "attnzoo-long-text")
_waiting: set[asyncio.Future[Any]] = set()

Result = TypeVar("Result")


async def aside(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` in a thread, for a text of `size`. Raises what it raises; ApiError 429 when too many wait."""
    loop = asyncio.get_running_loop()
    if size <= LONG:
        return await loop.run_in_executor(_SHORT, work, *arguments)
    if len(_waiting) >= MAX_LONG:
        message = "too many long texts are being read; try again in a moment"
        raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
    future = loop.run_in_executor(_BOOKS, work, *arguments)
    _waiting.add(future)
    future.add_done_callback(_waiting.discard)
    return await future


async def encode_text(text: str, engine: AsyncEngine, param: str) -> list[int]:
    """Tokens of a prompt. Raises ApiError that names `param`."""
    try:
        return await aside(len(text), engine.engine.encode, text)
    except ContextLengthError as error:
        raise too_long(error, param) from None


async def encode_chat(messages: Sequence[Mapping[str, str]], engine: AsyncEngine, param: str) -> list[int]:
    """Tokens of a conversation. Raises ApiError that names `param`."""
    most = engine.engine.max_model_len
    if len(messages) > most:
        message = f"{param} holds {len(messages)} messages, and this model's context is {most} tokens; send fewer"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    size = sum(len(message["content"]) + MESSAGE_CHARACTERS for message in messages)
    try:
        return await aside(size, engine.engine.encode_chat, messages)
    except ContextLengthError as error:
        raise too_long(error, param) from None
    except ValueError as error:
        raise ApiError(400, str(error)[:MAX_QUOTED], param=param, code="chat_template_error") from None


def check_tokens(count: int, engine: AsyncEngine, param: str) -> None:
    """Raises ApiError for a prompt that leaves no room for an answer, before its tokens are looked at."""
    most = engine.engine.max_model_len
    if count >= most:
        message = f"this model's context is {most} tokens, but the prompt has {count}; shorten the prompt"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def too_long(error: ContextLengthError, param: str) -> ApiError:
    """A prompt, or a prompt and its answer, that the model cannot read."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")
