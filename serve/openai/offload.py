"""Work that takes longer than a moment, away from the event loop: every stream of the server waits for the loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

LARGE = 20_000
"""Bytes or characters from which on work has a thread of its own kind."""
_large = ThreadPoolExecutor(1, thread_name_prefix="attnzoo-large")


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function`, run in a thread. Large work goes one after the other: small work never waits for it."""
    if size <= LARGE:
        return await asyncio.to_thread(function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_large, lambda: function(*args, **kwargs))


async def read(parse: Callable[[bytes], T], body: bytes) -> T:
    """What `parse` makes of a body: at once of a small one, elsewhere of a large one."""
    return parse(body) if len(body) <= LARGE else await off_loop(len(body), parse, body)
