"""The proxy's end: it listens, and puts the events that arrive into the answers that they are of."""

import asyncio
import contextlib
import secrets
import socket
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.relay.frames import HEADER, SUPPORTED, Frames, address, is_own, without

LATE_S = 5.0
"""Seconds that an answer's last events may arrive after Ray has said that it is complete. They were sent before."""


class Relay:
    """ASGI middleware directly around Ray's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._name = secrets.token_hex(16)
        self._open: dict[int, Incoming] = {}
        self._listening: asyncio.Task[bool] | None = None
        self._server: asyncio.Server | None = None  # kept: uvloop closes one that nobody holds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._listening is None:
            self._listening = asyncio.ensure_future(self._listen())
        if scope["type"] != "http" or not await asyncio.shield(self._listening):
            await self.app(scope, receive, send)
            return
        number = secrets.randbits(63)
        incoming = self._open[number] = Incoming()
        target = (HEADER, f"{self._name} {number}".encode())
        answer = RelayedAnswer(send, incoming)
        try:
            await self.app({**scope, "headers": [*scope["headers"], target]}, receive, answer.send)
        finally:
            del self._open[number]
            await answer.close()

    async def _listen(self) -> bool:
        """Whether replicas can connect."""
        if not SUPPORTED:
            return False
        own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            own.bind(address(self._name))
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: Inlet(self._open), sock=own)
        except OSError:
            own.close()
            return False
        return True


class Incoming:
    """The events of one answer that have arrived and not been passed on: at most what a request may generate."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._ended = self._lost = False
        self._wake, self._complete = asyncio.Event(), asyncio.Event()

    def put(self, data: bytes) -> None:
        """Some of the body; empty at its end."""
        self._chunks.append(data)
        self._wake.set()
        if not data:
            self._ended = True
            self._complete.set()

    def lose(self) -> None:
        """Nothing more will arrive."""
        self._lost = True
        self._wake.set()
        self._complete.set()

    async def wait(self, timeout_s: float) -> None:
        """Waits until nothing more will arrive; what is later counts as lost."""
        try:
            await asyncio.wait_for(self._complete.wait(), timeout_s)
        except TimeoutError:
            self.lose()

    async def next(self) -> bytes:
        """Waits, and returns all that came since the last call; nothing at the end. Raises ConnectionError."""
        while not self._chunks and not self._ended:
            if self._lost:
                raise ConnectionError("the replica's process has ended before its answer")
            self._wake.clear()
            await self._wake.wait()
        found, self._chunks = b"".join(self._chunks), []
        return found


class RelayedAnswer:
    """Sends one answer: start and end as Ray passes them on, and between them what arrives beside Ray."""

    def __init__(self, send: Send, incoming: Incoming) -> None:
        self._send, self._incoming = send, incoming
        self._events: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        """Gets Ray's messages. An answer whose events were lost gets no end, so that it counts as cut."""
        if message["type"] == "http.response.start":
            headers, relayed = without(message.get("headers", []))
            await self._send({**message, "headers": headers})
            if relayed is not None:
                self._events = asyncio.ensure_future(self._pass_on())
            return
        if self._events is not None:
            await self._incoming.wait(LATE_S)
            try:
                await self._events
            except ConnectionError:
                return
        await self._send(message)

    async def _pass_on(self) -> None:
        while data := await self._incoming.next():
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self) -> None:
        """Ends what is still passed on, when Ray has ended the answer in another way or the client has gone."""
        if self._events is not None:
            self._events.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await self._events


class Inlet(asyncio.Protocol):
    """The connection of one replica."""

    def __init__(self, answers: dict[int, Incoming]) -> None:
        self._answers, self._frames = answers, Frames()
        self._begun: set[int] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Only this user's processes are let in."""
        self._transport = cast(asyncio.Transport, transport)
        if not is_own(transport.get_extra_info("socket")):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Hands out the frames; those of answers that are closed are for nobody. Who sends others is no replica."""
        try:
            for number, some in self._frames.feed(data):
                if (answer := self._answers.get(number)) is not None:
                    self._begun.add(number)
                    answer.put(some)
                if not some or answer is None:
                    self._begun.discard(number)
        except ValueError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The answers that this replica has begun get nothing more."""
        for number in self._begun & self._answers.keys():
            self._answers[number].lose()
