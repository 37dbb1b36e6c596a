"""One thread at a time."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")
Owner = TypeVar("Owner", bound=Any)


def alone(method: Callable[Concatenate[Owner, Given], Result]) -> Callable[Concatenate[Owner, Given], Result]:
    """A method that waits until no other thread is in a method of the same object that is `alone`. The object has a
    `lock`, a `threading.RLock`."""

    @wraps(method)
    def guarded(self: Owner, *given: Given.args, **named: Given.kwargs) -> Result:
        with self.lock:
            return method(self, *given, **named)

    return guarded
