"""Keeps attention maps until their download, for a limited time and within a limit of bytes."""

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass


class MapsFullError(Exception):
    """There is no room for more maps now. wait_s: seconds after which some room may be free."""

    def __init__(self, message: str, wait_s: int) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class StoredMap:
    """A file that can be downloaded until the clock says `ends`."""

    data: bytes
    ends: float


class MapStore:
    """Files in memory, by names that nobody can guess. Room is reserved before anything is computed, so that a map that
    was asked for has its place. Only the event loop calls it.

    max_bytes: of reserved room and files together. ttl_s: seconds that a file is kept.
    """

    def __init__(self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self.ttl_s, self._clock = max_bytes, ttl_s, clock
        self._files: dict[str, StoredMap] = {}
        self.reserved = 0

    @property
    def nbytes(self) -> int:
        """Bytes of reserved room and files."""
        return self.reserved + sum(len(file.data) for file in self._files.values())

    def reserve(self, nbytes: int) -> "Room":
        """Room for the maps of one request. Raises MapsFullError."""
        self.sweep()
        if nbytes and self.nbytes + nbytes > self.max_bytes:
            first = next(iter(self._files.values()), None)
            wait_s = 1 if first is None else max(1, math.ceil(first.ends - self._clock()))
            raise MapsFullError(
                f"this request's maps take {nbytes:,} bytes, and {self.nbytes:,} of {self.max_bytes:,} are in use",
                wait_s,
            )
        self.reserved += nbytes
        return Room(self, nbytes)

    def get(self, name: str) -> bytes | None:
        """A file; None if there is none of that name, or its time is over."""
        self.sweep()
        found = self._files.get(name)
        return None if found is None else found.data

    def sweep_later(self) -> None:
        """Removes the newest file when its time is over, even if nobody asks for any by then."""
        asyncio.get_running_loop().call_later(self.ttl_s + 0.01, self.sweep)

    def sweep(self) -> None:
        """Removes files whose time is over: the oldest come first."""
        now = self._clock()
        while self._files:
            name = next(iter(self._files))
            if self._files[name].ends > now:
                return
            del self._files[name]

    def _put(self, data: bytes) -> str:
        name = secrets.token_urlsafe(24)
        self._files[name] = StoredMap(data, self._clock() + self.ttl_s)
        return name

    def _drop(self, name: str) -> None:
        self._files.pop(name, None)


class Room:
    """The room of one request; `close` gives back what it has not filled, and without `deliver` its files too."""

    def __init__(self, store: MapStore, nbytes: int) -> None:
        self._store, self._left = store, nbytes
        self._names: list[str] = []

    def put(self, data: bytes) -> str:
        """Stores a file in the room, and returns its name."""
        assert len(data) <= self._left, f"a map of {len(data)} bytes, and {self._left} were reserved"
        self._take(len(data))
        self._names.append(self._store._put(data))
        return self._names[-1]

    def deliver(self) -> None:
        """The client has the names of all files, which now stay until their time is over."""
        self._names.clear()

    def close(self) -> None:
        """Ends the request. May be called twice."""
        self._take(self._left)
        while self._names:
            self._store._drop(self._names.pop())

    def _take(self, nbytes: int) -> None:
        self._left -= nbytes
        self._store.reserved -= nbytes
