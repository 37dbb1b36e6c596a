"""Refusals in OpenAI's shape."""

from typing import Any

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
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


def short_name(name: str) -> str:
    """A field's name as an answer may repeat it: not too long, and text that UTF-8 can hold."""
    shown = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    return shown.encode("utf-8", errors="replace").decode()


def unsupported(name: str, what: str = "is not supported by this server; leave it out") -> ApiError:
    """A field that clients know and this server does not."""
    return ApiError(400, f"{name} {what}", param=name, code="unsupported")
