"""Errors of requests, and who may read their messages.

A message may quote the prompt. So only the request's owner gets its text; logs and the owners of other requests in the
same step do not.
"""

import logging

MAX_MESSAGE = 1000
"""Longest message to a request's owner, in characters."""

logger = logging.getLogger("attnzoo.serve")


class DeviceError(RuntimeError):
    """The device no longer works."""


class LogitsError(FloatingPointError):
    """The model's logits are not finite, so that no token can be chosen. It is logged without a traceback, which would
    not show the cause; its fixed message quotes no prompt."""


class EditsError(LogitsError):
    """The logits are not finite with the edits that the request itself asks for."""


class SharedError(RuntimeError):
    """The error of a computation that several requests shared; its message does not contain the cause's text."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__(f"the engine failed while it worked on this request ({type(failure).__name__}); try again")
        self.__traceback__ = failure.__traceback__


def message(failure: BaseException) -> str:
    """The message for the owner of a request that failed."""
    if isinstance(failure, SharedError | EditsError):
        return str(failure)
    text = str(failure)
    cut = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."
    return f"this request failed: {type(failure).__name__}: {cut}".removesuffix(": ")


def log(what: str, failure: BaseException, level: int = logging.ERROR) -> None:
    """Logs the traceback and the type of a failure, but not its text."""
    if isinstance(failure, LogitsError):
        logger.log(level, "%s: %s", what, failure)
        return
    logger.log(level, "%s: %s", what, type(failure).__name__, exc_info=_without_text(failure))


def _without_text(failure: BaseException) -> BaseException:
    """The same traceback under an exception without a message."""
    return RuntimeError("message withheld").with_traceback(failure.__traceback__)
