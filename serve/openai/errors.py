"""Refusals in OpenAI's shape, for the application and for what stands before it, and JSON in one line."""

import json
from typing import Any

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
MAX_QUOTED = 500
"""Characters of a message that may hold what a request said."""
BREAKS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x7f\x85\u2028\u2029"})
"""Characters that JSON may hold as they are and at which readers of lines break one; others are escaped by JSON."""
MAX_NAME = 64
"""Characters of a field's name that an answer repeats."""


class ApiError(Exception):
    """A refusal in OpenAI's shape."""

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
        """The JSON of the answer."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def dump(value: Any) -> bytes:
    """Compact JSON on one line. Raises ValueError for what is no JSON (NaN)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(BREAKS).encode()


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def short_name(name: str) -> str:
    """A field's name as an answer may repeat it: not too long, and text that UTF-8 can hold."""
    shown = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    return shown.encode("utf-8", errors="replace").decode()


def unsupported(name: str, what: str = "is not supported by this server; leave it out") -> ApiError:
    """A field that clients know and this server does not."""
    return ApiError(400, f"{name} {what}", param=name, code="unsupported")
