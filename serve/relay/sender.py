"""The replica's end: the events of its answers go to the proxy that asked, those of one step in one piece."""

import asyncio
import contextlib
import re
import socket
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.relay.frames import HEADER, SUPPORTED, address, frames, is_own, without

TARGET = re.compile(rb"([0-9a-f]{32}) ([0-9]{1,19})")
"""The name of a proxy's socket and the number of an answer."""


class Outlet:
    """ASGI middleware around a replica's application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._lines: dict[str, Line] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, value = without(scope["headers"])
        scope = {**scope, "headers": headers}
        target = None if value is None else TARGET.fullmatch(value)
        line = None if target is None else await self._line(target[1].decode())
        if target is None or line is None:
            await self.app(scope, receive, send)
            return
        answer = Departing(send, line, int(target[2]))
        try:
            await self.app(scope, receive, answer.send)
        finally:
            answer.end()

    async def _line(self, name: str) -> "Line | None":
        """The connection to a proxy; None if it cannot be reached, or is not this user's."""
        line = self._lines.get(name)
        if line is None or line.closed:
            line = self._lines[name] = Line(name)
        with contextlib.suppress(OSError):
            await line.connect()
        if line.closed:
            self._lines.pop(name, None)
            return None
        return line


class Departing:
    """One answer. If it is a stream of events, only its start and its end go through Ray."""

    def __init__(self, send: Send, line: "Line", number: int) -> None:
        self._send, self._line, self._number = send, line, number
        self._relayed = False

    async def send(self, message: Message) -> None:
        """Gets the application's messages."""
        if message["type"] == "http.response.start":
            self._relayed = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", [])
            )
            if self._relayed:
                message = {**message, "headers": [*message["headers"], (HEADER, b"1")]}
        elif self._relayed:
            if message.get("body"):
                self._line.write(frames(self._number, message["body"]))
            if message.get("more_body"):
                return
            self.end()
            message = {**message, "body": b""}
        await self._send(message)

    def end(self) -> None:
        """Says that no more events come. May be called twice."""
        if self._relayed:
            self._relayed = False
            self._line.write(frames(self._number, b""))


class Line(asyncio.Protocol):
    """The connection to one proxy. What is written in one turn of the event loop leaves in one piece.

    A proxy that reads slowly is not waited for: what waits here is at most what its requests may generate.
    """

    def __init__(self, name: str) -> None:
        self.closed = False
        self._name = name
        self._pending: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connects once, whoever asks. Raises OSError."""
        if self._connecting is None:
            self._connecting = asyncio.ensure_future(self._connect())
        await asyncio.shield(self._connecting)

    async def _connect(self) -> None:
        own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not SUPPORTED:
                raise OSError("this system has no abstract sockets")
            own.setblocking(False)
            own.connect(address(self._name))  # on one machine: at once, or not at all
            if not is_own(own):
                raise PermissionError("the socket belongs to another user")
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=own)
        except OSError:
            self.closed = True
            own.close()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Later answers ask for another line."""
        self.closed = True

    def write(self, data: bytes) -> None:
        """Sends it with whatever else is written in this turn; to a proxy that has gone, nothing."""
        if self.closed:
            return
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append(data)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if self._transport is not None and not self.closed:
            self._transport.write(b"".join(pending))
