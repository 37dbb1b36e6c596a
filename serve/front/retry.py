"""What clients see when a replica dies: their request again on another one, or an error that they can understand.

Ray's proxy answers a request whose replica died with a plain 500, ends a stream in its middle, and keeps new requests
until a new replica has started. Here a request is given to the proxy again as long as nothing of its answer is out;
after `PATIENCE_S` without any replica it ends with 503 and Retry-After, and a stream that is cut ends with an error
event.
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
"""How many replicas there are now; None where that is not known."""


def restarting() -> ApiError:
    """The refusal while no replica runs."""
    message = "the model's process has ended and is being started anew; try again in a moment"
    return ApiError(503, message, code="unavailable", headers={"retry-after": str(RETRY_AFTER_S)})


class Retry:
    """Around Ray's proxy application. Give it requests whose body is complete."""

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
                # Ray writes into the scope: each attempt has its own.
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
        """Waits for a replica, not for long."""
        for _ in range(round(PATIENCE_S / POLL_S)):
            if self._replicas() != 0:
                return True
            if inbox.gone:
                return False
            await asyncio.sleep(POLL_S)
        return False


class Attempt:
    """What one attempt answers. The first message waits for the second: until then another attempt is possible."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._events = self._refused = False
        self.begun = self.complete = False

    async def send(self, message: Message) -> None:
        """Passes on what the application says, but not the proxy's own words about a dead replica."""
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
        """Ends a stream of events that its replica did not end; anything else is left for the connection to break."""
        if self._events:
            message = "the model's process ended while it worked on this request"
            error = ApiError(500, message, code="engine_failed")
            body = b"data: " + dump(error.body()) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})


class Inbox:
    """The request's messages, the same for every attempt; and a way to take an attempt back.

    Ray's proxy asks for messages all the time, to hear of a client that goes away. While an attempt has not begun and
    there is no replica for `PATIENCE_S`, it is told just that: it then cancels what it has queued.
    """

    def __init__(self, receive: Receive, replicas: Replicas) -> None:
        self._receive, self._replicas = receive, replicas
        self._seen: list[Message] = []
        self._pending: asyncio.Task[Message] | None = None
        self._attempt: Attempt | None = None
        self._next = 0
        self.gone = False

    def begin(self, attempt: Attempt) -> None:
        """Starts from the first message."""
        self._attempt, self._next = attempt, 0

    def close(self) -> None:
        """Leaves nothing behind."""
        if self._pending is not None:
            self._pending.cancel()

    async def receive(self) -> Message:
        """The ASGI receive of the current attempt."""
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
