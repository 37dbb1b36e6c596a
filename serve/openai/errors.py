"""Errors in OpenAI's format, for the application and for `serve.front`, and JSON on one line."""

import json
from typing import Any

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
MAX_QUOTED = 500
"""Longest message that may quote a request, in characters."""
BREAKS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x7f\x85\u2028\u2029"})
"""Characters that JSON need not escape, but at which some readers break lines."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
MAX_NAME = 64
"""Longest part of a field's name that an answer repeats, in characters."""


class ApiError(Exception):
    """An error answer in OpenAI's format. param: the field that is wrong. code: an identifier for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def dump(value: Any) -> bytes:
    """Compact JSON on one line. Raises ValueError for NaN and infinity."""
    text = _encode(value)
    if not text.isascii() or "\x7f" in text:  # the table takes as long as all of the rest
        text = text.translate(BREAKS)
    return text.encode()


def event(value: Any) -> bytes:
    """A server-sent event with `value` as JSON."""
    return b"data: " + dump(value) + b"\n\n"


def short_name(name: str) -> str:
    """A name from a request, shortened and valid in UTF-8, so that an answer can repeat it."""
    shown = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    return shown.encode("utf-8", errors="replace").decode()


def unsupported(name: str, what: str = "is not supported by this server; leave it out") -> ApiError:
    """The error for a field that clients of other servers use and this server does not support."""
    return ApiError(400, f"{name} {what}", param=name, code="unsupported")
