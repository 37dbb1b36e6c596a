"""What went wrong, and who may read about it.

A message may quote the prompt it is about. So its text goes to the request's owner only: neither into logs, nor to
those whose requests happened to run beside it.
"""

import logging

MAX_MESSAGE = 1000
"""Characters of a message that its owner gets."""

logger = logging.getLogger("attnzoo.serve")


class DeviceError(RuntimeError):
    """The device no longer answers: nothing can be computed any more."""


class LogitsError(FloatingPointError):
    """The model gave no numbers to choose a token by. Where that was noticed says nothing: one line of log is enough,
    and its message, which is always the same, may stand there."""


class SharedError(RuntimeError):
    """Something failed that several requests had in common; without the text of what failed."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__(f"the engine failed while it worked on this request ({type(failure).__name__}); try again")
        self.__traceback__ = failure.__traceback__


def message(failure: BaseException) -> str:
    """What the owner of a request reads."""
    if isinstance(failure, SharedError):
        return str(failure)
    text = str(failure)
    cut = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."
    return f"this request failed: {type(failure).__name__}: {cut}".removesuffix(": ")


def log(what: str, failure: BaseException, level: int = logging.ERROR) -> None:
    """Where it failed and with which type, which are enough to find the fault; the text stays out."""
    if isinstance(failure, LogitsError):
        logger.log(level, "%s: %s", what, failure)
        return
    logger.log(level, "%s: %s", what, type(failure).__name__, exc_info=_without_text(failure))


def _without_text(failure: BaseException) -> BaseException:
    """The same traceback under an exception without a message."""
    return RuntimeError("message withheld").with_traceback(failure.__traceback__)
