"""Repeats a request on another replica when its replica dies, or answers with an error that clients understand.

When a replica dies, Ray's proxy answers with a plain 500, ends a stream in its middle, and holds new requests until a
new replica has started. This middleware repeats a request as long as no part of its answer was sent. After
`PATIENCE_S` seconds without a replica the request ends with 503 and Retry-After. A stream that was cut ends with an
error event.
"""

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.openai.errors import ApiError, dump

PATIENCE_S = 2.0
POLL_S = 0.2
MAX_ATTEMPTS = 3
RETRY_AFTER_S = 5

Replicas = Callable[[], int | None]
"""Returns the current number of replicas; None if it is unknown."""


def restarting() -> ApiError:
    """The error 503 while no replica runs."""
    message = (
        "no process of the model is ready: it is being loaded, or started anew after it ended; try again in a moment"
    )
    return ApiError(503, message, code="unavailable", headers={"retry-after": str(RETRY_AFTER_S)})


class Retry:
    """ASGI middleware around Ray's proxy; it needs requests with complete bodies."""

    def __init__(self, app: ASGIApp, replicas: Replicas) -> None:
        self.app, self._replicas = app, replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self.app(scope, receive, send)
            return
        inbox = Inbox(receive, self._replicas)
        try:
            for _ in range(MAX_ATTEMPTS):
                if not await self._some_replica(inbox):
                    break
                attempt = Attempt(send)
                inbox.begin(attempt)
                # Ray changes the scope, so that each attempt needs its own.
                await self.app({**scope, "headers": list(scope["headers"])}, inbox.receive, attempt.send)
                if attempt.complete or inbox.gone:
                    return
                if attempt.begun:
                    await attempt.cut()
                    return
                await asyncio.sleep(POLL_S)
        finally:
            inbox.close()
        if not inbox.gone:
            error = restarting()
            answer = Response(dump(error.body()), error.status, error.headers, media_type="application/json")
            await answer(scope, receive, send)

    async def _some_replica(self, inbox: "Inbox") -> bool:
        """Waits up to `PATIENCE_S` seconds for a replica; False if there is none or the client has disconnected."""
        for _ in range(round(PATIENCE_S / POLL_S)):
            if self._replicas() != 0:
                return True
            if inbox.gone:
                return False
            await asyncio.sleep(POLL_S)
        return False


class Attempt:
    """The answer of one attempt. Its first message waits for the second; until then another attempt is possible."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._events = self._refused = False
        self.begun = self.complete = False

    async def send(self, message: Message) -> None:
        """Passes on the application's messages, but drops the proxy's own error about a dead replica."""
        if message["type"] == "http.response.start":
            kinds = [bytes(value) for name, value in message["headers"] if bytes(name).lower() == b"content-type"]
            self._events = any(kind.startswith(b"text/event-stream") for kind in kinds)
            self._refused = message["status"] in (429, 503) and any(k.startswith(b"text/plain") for k in kinds)
            self._start = message
            return
        if self._refused:
            return
        if self._start is not None:
            self.begun = True
            start, self._start = self._start, None
            await self._send(start)
        self.complete = not message.get("more_body", False)
        await self._send(message)

    async def cut(self) -> None:
        """Ends an event stream that its replica left unfinished with an error event; other answers stay incomplete."""
        if self._events:
            message = "the model's process ended while it worked on this request"
            error = ApiError(500, message, code="engine_failed")
            body = b"data: " + dump(error.body()) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})


class Inbox:
    """The request's messages, replayed for every attempt.

    Ray's proxy keeps calling `receive` to notice that a client disconnects. When there is no replica for `PATIENCE_S`
    seconds and the attempt has not begun to answer, `receive` reports a disconnect, so that Ray cancels the attempt.
    """

    def __init__(self, receive: Receive, replicas: Replicas) -> None:
        self._receive, self._replicas = receive, replicas
        self._seen: list[Message] = []
        self._pending: asyncio.Task[Message] | None = None
        self._attempt: Attempt | None = None
        self._next = 0
        self.gone = False

    def begin(self, attempt: Attempt) -> None:
        """Begins a new attempt, which gets all messages from the first one."""
        self._attempt, self._next = attempt, 0

    def close(self) -> None:
        """Cancels the pending read."""
        if self._pending is not None:
            self._pending.cancel()

    async def receive(self) -> Message:
        """The ASGI `receive` of the current attempt."""
        attempt = self._attempt
        assert attempt is not None, "receive before the first attempt"
        if self._next < len(self._seen):
            self._next += 1
            return self._seen[self._next - 1]
        if self._pending is None:
            self._pending = asyncio.ensure_future(_next(self._receive))
        alone = 0
        while not self._pending.done():
            if not attempt.begun:
                alone = alone + 1 if self._replicas() == 0 else 0
                if alone > PATIENCE_S / POLL_S:
                    return {"type": "http.disconnect"}
            await asyncio.wait({self._pending}, timeout=None if attempt.begun else POLL_S)
        message = self._pending.result()
        self._pending = None
        if message["type"] == "http.disconnect":
            self.gone = True
            return message
        self._seen.append(message)
        self._next += 1
        return message


async def _next(receive: Receive) -> Message:
    return await receive()
