"""ASGI middleware that checks who sends a request and limits its size and time; the outermost comes first:

    Counted        counts the status of every answer, for the metrics
    HeaderFilter   accepts only requests for this server's names, and removes headers that control Ray
    ApiKey         checks the API key before the body is read
    Bodies         reads a JSON body completely, within limits of size, time and number of half-read requests

The application gets requests with complete bodies. Refusals are JSON in OpenAI's format.
"""

import asyncio
import hmac
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.front.hosts import Hosts
from serve.front.limits import MAX_HEADER_BYTES, Limits
from serve.openai.errors import ApiError, dump
from serve.relay.frames import HEADER

OPEN_PATHS, OPEN_FOLDERS = ("/health", "/ready", "/-/healthz", "/patients", "/vision"), ("/patients/", "/vision/")
"""Paths that need no API key: the server's health and whether it takes requests, the health of Ray's proxy, and the
static files of the pages for patients and for pictures, which a browser opens without a key."""
JSON_KINDS, FHIR_PATH = ("application/json", "application/fhir+json"), "/v1/predict"
"""Kinds of bodies, and the path that takes the second one too."""
CHARSET = {"", "charset=utf-8", "charset=utf8"}
PARAMETERS = {JSON_KINDS[0]: CHARSET, JSON_KINDS[1]: CHARSET | {"fhirversion=4.0", "fhirversion=4.0.1"}}
"""What a content-type may say behind the kind."""
GRACE_S = 2.0
"""Seconds in which a half-read request is not ended in favour of a newer one: in a burst all requests are young."""
STEERING = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    "x-session-id",
    "traceparent",
    HEADER.decode(),
)
"""Headers with which Ray 2.60 lets a client set deadline, cancellation, replica and trace of a request; Ray also takes
`_` for `-`. And the one that says where events go. Clients must not control these."""
STEERING_PREFIX = "x-serve-router-"
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
"""An X-Request-ID that may appear in logs and answers; for any other Ray generates one."""


def guard(limits: Limits) -> list[Middleware]:
    """The middleware for these limits, the outermost first. Raises the ValueError of `read_api_key`."""
    key = read_api_key(limits.api_key_env)
    keyed = [] if key is None else [Middleware(ApiKey, key=key)]
    return [Middleware(HeaderFilter, limits=limits), *keyed, Middleware(Bodies, limits=limits)]


def read_api_key(variable: str | None) -> str | None:
    """The API key in the environment variable `variable` (None: no key). Raises ValueError if the variable is not set,
    or has characters that a client cannot send in a header."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"api_key_env={variable!r}: set that environment variable to the API key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"api_key_env={variable!r}: that variable holds spaces, line ends or other characters that no client can "
            "send in a header; use letters, digits and ASCII punctuation"
        )
    return key


def error_response(error: ApiError) -> Response:
    """The HTTP response for an error, in OpenAI's format."""
    return Response(dump(error.body()), error.status, error.headers, media_type="application/json")


class Counted:
    """Calls `answered` with the status of every answer to a request for /v1/."""

    def __init__(self, app: ASGIApp, answered: Callable[[int], None]) -> None:
        self.app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(message["status"])
            await send(message)

        of_api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await self.app(scope, receive, counted if of_api else send)


class HeaderFilter:
    """Refuses foreign Host and Origin headers, too large headers and WebSockets; removes headers that control Ray."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self._hosts = app, Hosts(limits)
        self._steering = {*STEERING, _dashed(os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id"))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "this server has no WebSockets"})
            return
        if scope["type"] == "http":
            error = self._judge(scope)
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
            scope["headers"] = [(name, value) for name, value in scope["headers"] if self._keeps(name, value)]
        await self.app(scope, receive, send)

    def _judge(self, scope: Scope) -> ApiError | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope.get("raw_path") or b"")
        if size + len(scope["query_string"]) > MAX_HEADER_BYTES:
            return ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES >> 10} KiB", code="headers_too_large")
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._hosts.accepts(hosts[0]):
            said = f"{hosts[0][:200]!r} is no name of this server" if len(hosts) == 1 else "exactly one is needed"
            message = f"the Host header is refused: {said}; the server's setting allowed_hosts says which names are"
            return ApiError(403, message, code="host_not_allowed")
        for name, value in headers:
            if name == b"origin" and not self._hosts.accepts_origin(value.decode("latin-1")):
                message = f"pages of {value.decode('latin-1')[:200]!r} may not use this server; see allowed_hosts"
                return ApiError(403, message, code="origin_not_allowed")
        return None

    def _keeps(self, name: bytes, value: bytes) -> bool:
        dashed = _dashed(name.decode("latin-1"))
        if dashed == "x-request-id":
            return REQUEST_ID.fullmatch(value) is not None
        return dashed not in self._steering and not dashed.startswith(STEERING_PREFIX)


def _dashed(name: str) -> str:
    return name.lower().replace("_", "-")


class ApiKey:
    """Refuses requests without `Authorization: Bearer <key>` for all but `OPEN_PATHS` and `OPEN_FOLDERS`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["path"]) and not self._knows(scope):
            error = ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer <key>",
                code="invalid_api_key",
                headers={"www-authenticate": 'Bearer realm="attnzoo"'},
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].strip(b" \t").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(b" \t"), self._key)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class Bodies:
    """Reads bodies completely. A body that does not arrive in time ends with status 408. At most `max_reading` bodies
    arrive at the same time; one more ends the oldest, once that has had `GRACE_S` seconds."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self._limits = app, limits
        self._reading: dict[asyncio.Timeout, float] = {}  # start time by request, the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self.app(scope, receive, send)
            return
        error = _judge_body(scope, self._limits.max_body_bytes)
        body: bytes | None = None
        if error is None:
            try:
                body = await self._read(receive)
            except ApiError as refusal:
                error = refusal
        if error is not None:
            await error_response(error)(scope, receive, send)
        elif body is not None:
            await self.app(scope, replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None if the client has disconnected. Raises ApiError 408 or 413."""
        parts, size, limit = [], 0, self._limits.max_body_bytes
        try:
            with self._counted() as deadline:
                async with deadline:
                    while True:
                        message = await receive()
                        if message["type"] != "http.request":
                            return None
                        parts.append(message.get("body", b""))
                        size += len(parts[-1])
                        if size > limit:
                            raise too_large(limit)
                        if not message.get("more_body", False):
                            return b"".join(parts)
        except TimeoutError:
            text = f"the body did not arrive within {self._limits.body_timeout_s:g} s, or others were waiting"
            raise ApiError(408, text, code="body_timeout", headers={"connection": "close"}) from None

    @contextmanager
    def _counted(self) -> Iterator[asyncio.Timeout]:
        now = asyncio.get_running_loop().time()
        deadline = asyncio.timeout_at(now + self._limits.body_timeout_s)
        if len(self._reading) >= self._limits.max_reading:
            oldest = next(iter(self._reading))
            oldest.reschedule(max(now, self._reading.pop(oldest) + GRACE_S))
        self._reading[deadline] = now
        try:
            yield deadline
        finally:
            self._reading.pop(deadline, None)


def replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI `receive` that returns the body in one message, and afterwards what `receive` returns."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def too_large(limit: int) -> ApiError:
    """The error 413 for a body larger than `limit` bytes."""
    return ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")


def _has_body(scope: Scope) -> bool:
    """Whether the request announces a body and has a method that uses one."""
    if scope["method"] not in ("POST", "PUT", "PATCH"):
        return False
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0") != b"")
        for name, value in scope["headers"]
    )


def _judge_body(scope: Scope, limit: int) -> ApiError | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"content-length" and (not value.isdigit() or len(value) > 15 or int(value) > limit):
            return too_large(limit)
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            message = "send the body without transfer-encoding, or with transfer-encoding: chunked"
            return ApiError(415, message, code="unsupported_media_type")
        if name == b"content-encoding" and value.strip().lower() != b"identity":
            return ApiError(415, "send the body without content-encoding", code="unsupported_media_type")
    kinds = [value.decode("latin-1").lower() for name, value in headers if name == b"content-type"]
    kind, _, rest = kinds[0].partition(";") if len(kinds) == 1 else ("", "", "")
    said = set(rest.replace(" ", "").replace('"', "").split(";"))
    allowed = JSON_KINDS if scope["path"] == FHIR_PATH else JSON_KINDS[:1]
    if kind.strip() not in allowed or not said <= PARAMETERS[kind.strip()]:
        # This also keeps web pages out: without a preflight request a browser sends neither of them.
        message = f"the body must be JSON, sent as content-type: {' or '.join(allowed)}, not {', '.join(kinds)[:200]!r}"
        return ApiError(415, message, code="unsupported_media_type")
    return None
