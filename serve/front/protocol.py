"""uvicorn's HTTP/1.1 protocol with limits for headers and idle connections.

uvicorn with httptools accepts headers of any size and waits for them without end. Here a request whose headers exceed
`MAX_HEADER_BYTES` gets status 431, and one whose headers take longer than `header_timeout_s` gets 408. A client that
does not read its answer for `write_timeout_s` is disconnected. Of more than `MAX_WAITING` connections without a running
request the oldest is closed. A request that is not HTTP is refused in OpenAI's format. A client that hangs up ends the
request that is being answered, also where it has sent the next ones already, of which uvicorn would tell the last
alone. `serve.front.guard` limits bodies; this module handles the part of a body that arrives after the answer.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serve.front.limits import MAX_HEADER_BYTES, Limits
from serve.openai.errors import ApiError, dump

MAX_WAITING = 512
MAX_PIPELINED = 64
"""Requests of one connection that may wait for the answer to the one before; more end the connection."""
LINGER_S = 5.0
"""Seconds for which input is read and discarded after a refusal; closing at once could lose the answer."""


class HttpParser:
    """httptools' parser, but it ignores the header Upgrade except for WebSockets, as RFC 9110, section 7.8, allows.

    After a head with Upgrade httptools takes the rest, even a body, for data of the other protocol. So this parser
    parses the head again without Upgrade.
    """

    def __init__(self, protocol: "BoundedProtocol") -> None:
        self._protocol = protocol
        self._inner = httptools.HttpRequestParser(protocol)
        self._inner.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn: to answer before refusing
        self.get_method, self.get_http_version = self._inner.get_method, self._inner.get_http_version
        self.should_upgrade, self.should_keep_alive = self._inner.should_upgrade, self._inner.should_keep_alive

    def feed_data(self, data: bytes) -> None:
        """Parses the next bytes. Raises httptools' errors."""
        try:
            self._inner.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head = self._protocol.without_upgrade()
            if head is None:
                raise
            self.__init__(self._protocol)  # type: ignore[misc]
            self.feed_data(head + data[upgrade.args[0] :])


class BoundedProtocol(HttpToolsProtocol):
    """One connection. `bounded_protocol` makes a subclass with `limits` and `waiting` for a server."""

    limits: Limits
    waiting: "dict[BoundedProtocol, None]"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = HttpParser(self)  # type: ignore[assignment]
        self._ignores_upgrade = False
        self._in_head, self._message_open = True, False
        self._raw_bytes = self._parsed_bytes = self._messages = self._heads = 0
        self._refusal: ApiError | None = None
        self._discarding = False
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None  # or was answered last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._write_timer = None
        self.waiting.pop(self, None)
        for cycle in (self._answered, *(queued for queued, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        head, before = self._in_head, self._heads
        super().data_received(data)
        if self._discarding or self.transport.is_closing() or not self._in_head:
            return
        # If a head ended in this data, the rest may be a body; counting for the next head begins with the next data.
        if head and self._heads == before:
            self._raw_bytes += len(data)
        if max(self._raw_bytes, self._parsed_bytes) > MAX_HEADER_BYTES:
            self._refuse(_headers_too_large())
        elif self._timer is None:
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._message_open = True
        self._messages += 1
        self._raw_bytes = self._parsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self._in_head:
            super().on_header(name, value)
        # Else these are trailers, which the application does not get.

    def on_headers_complete(self) -> None:
        self._ignores_upgrade = self._get_upgrade() is not None and not self._should_upgrade()
        if self._ignores_upgrade:
            return  # the parser parses this head again without Upgrade
        self._in_head, self._parsed_bytes = False, 0
        self._heads += 1
        self._cancel_timer()
        self.waiting.pop(self, None)
        super().on_headers_complete()
        if self.pipeline:
            self._read_on()
        else:
            self._answered = self.cycle

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline:
            self._read_on()

    def _read_on(self) -> None:
        """Reads what is behind the request that is being answered, because a client that hangs up would not be seen:
        uvicorn has paused it. Ends the connection if that becomes more than one request may be, or too many."""
        waiting = sum(len(cycle.body) for cycle, _ in self.pipeline)
        if len(self.pipeline) > MAX_PIPELINED or waiting > self.limits.max_body_bytes:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def without_upgrade(self) -> bytes | None:
        """The last head without its header Upgrade; None if it has none, or if the upgrade is accepted."""
        if not self._ignores_upgrade:
            return None
        self._ignores_upgrade = False
        fields = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return b"\r\n".join([first, *fields, b"", b""])

    def on_message_complete(self) -> None:
        if self._ignores_upgrade:
            return
        self._in_head, self._message_open = True, False
        self._raw_bytes = 0
        if self.cycle is not None and self.cycle.response_complete:
            self._cancel_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self.cycle.response_complete:
            self._wait()
            if self._message_open and not self._in_head:
                self._start_timer(LINGER_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers a request that the parser or this class has refused; uvicorn calls it."""
        self._refuse(self._refusal or ApiError(400, "this is no HTTP/1.1 request", code="invalid_http"))

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > MAX_HEADER_BYTES:
            self._refusal = _headers_too_large()
            raise httptools.HttpParserCallbackError("headers too large")

    def _wait(self) -> None:
        """Enters this connection into those without a running request, and closes the oldest if they are too many."""
        self.waiting.pop(self, None)
        self.waiting[self] = None
        if len(self.waiting) > MAX_WAITING:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            oldest.transport.close()

    def _await_head(self) -> None:
        self._start_timer(self.limits.header_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # an earlier request on this connection is still being answered
        elif self._messages == 0 and self._raw_bytes == 0:
            self.transport.close()
        else:
            message = f"the headers did not arrive within {self.limits.header_timeout_s:g} s"
            self._refuse(ApiError(408, message, code="header_timeout"))

    def _start_timer(self, delay_s: float, action: Any) -> None:
        self._cancel_timer()
        self._timer = self.loop.call_later(delay_s, action)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError) -> None:
        """Sends an error instead of the application's answer, and discards further input."""
        if self._discarding or self.transport.is_closing():
            return
        self._discarding = True
        cycle = self.cycle
        busy = cycle is not None and not cycle.response_complete
        if busy:
            cycle.disconnected = True
            cycle.message_event.set()
        if busy and cycle.response_started:
            self.transport.abort()
            return
        body = dump(error.body())
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self._start_timer(LINGER_S, self.transport.abort)


def _headers_too_large() -> ApiError:
    return ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES >> 10} KiB", code="headers_too_large")


def bounded_protocol(limits: Limits) -> type[BoundedProtocol]:
    """The protocol class for one server: `uvicorn.Config(app, http=bounded_protocol(limits))`."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits, "waiting": {}})
