"""Computes in a thread beside the event loop, within limits: how many requests at a time, and until when."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from serve.faults import log, message
from serve.openai.errors import ApiError

Result = TypeVar("Result")


class LateError(Exception):
    """The request took longer than its time limit."""


@dataclass(frozen=True)
class Deadline:
    """at: of time.perf_counter."""

    at: float

    def check(self) -> None:
        """Raises LateError once the time is over."""
        if time.perf_counter() > self.at:
            raise LateError


@dataclass(frozen=True)
class Terms:
    """What a workplace does, for its messages, and its limits by the settings that they come from. what: of one work,
    such as "prediction". most: requests that may run or wait. timeout_s: of a request. fewer: what to do when a request
    takes too long."""

    what: str
    most: tuple[str, int]
    timeout_s: tuple[str, float]
    fewer: str


class Workplace:
    """One thread, and the requests that it computes for. Call the methods from one event loop."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.draining = False
        self.ended: Callable[[float], None] | None = None
        """Called with the seconds that a request took, refused ones included."""
        self._running = 0
        self._pool = ThreadPoolExecutor(1, f"attnzoo-{terms.what}")

    @contextmanager
    def admitted(self) -> Iterator[Deadline]:
        """Counts a request until it ends; yields its deadline. Raises ApiError 429 or 503."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="unavailable", headers={"retry-after": "5"})
        setting, most = self.terms.most
        if self._running >= most:
            text = f"{self._running} {self.terms.what}s are running or waiting ({setting}); try again in a moment"
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"})
        self._running += 1
        started = time.perf_counter()
        try:
            yield Deadline(started + self.terms.timeout_s[1])
        finally:
            self._running -= 1
            if self.ended is not None:
                self.ended(time.perf_counter() - started)

    async def work(self, deadline: Deadline, do: Callable[..., Result], *arguments: object) -> Result:
        """Computes in the thread, after what was asked before. Raises ApiError."""

        def timely() -> Result:
            deadline.check()
            return do(*arguments)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, timely)
        except ApiError:
            raise
        except LateError:
            setting, limit = self.terms.timeout_s
            text = f"the {self.terms.what} was not done within {setting}={limit:g}; {self.terms.fewer}"
            raise ApiError(503, text, code="timeout", headers={"retry-after": "5"}) from None
        except Exception as failure:
            log(f"a {self.terms.what} failed", failure)
            raise ApiError(500, message(failure), code="request_failed") from None

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for running ones; False if some did not end in time."""
        self.draining = True
        deadline = time.perf_counter() + timeout_s
        while self._running and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        return not self._running

    def stop(self) -> None:
        """Ends the thread after what it is computing."""
        self.draining = True
        self._pool.shutdown(wait=False, cancel_futures=True)
