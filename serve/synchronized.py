"""A decorator for methods that only one thread may run at a time."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")
Owner = TypeVar("Owner", bound=Any)


def synchronized(method: Callable[Concatenate[Owner, Given], Result]) -> Callable[Concatenate[Owner, Given], Result]:
    """Makes a method hold `self.lock` (a `threading.RLock`) while it runs, so that synchronized methods of one object
    exclude one another between threads."""

    @wraps(method)
    def guarded(self: Owner, *given: Given.args, **named: Given.kwargs) -> Result:
        with self.lock:
            return method(self, *given, **named)

    return guarded
