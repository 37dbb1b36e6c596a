"""Peak memory of a call on the CPU, from the allocator's own records."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that `call` holds at once beyond what was allocated before it, inside operators too.

    The profiler records every allocation of torch's CPU allocator, those of the autograd engine's threads included, and
    the release of what it saw allocated. So a call that frees older tensors looks as if it kept them, and so does one
    whose tensors another thread releases (collectives do). What other allocators take (numpy, the buffers of MKL, the
    interpreter) is not counted. The result of the call is released after the measurement.
    """
    return max(_levels(changes(call)), default=0)


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes still held when `call` has returned, its result included: what a forward pass keeps for its backward."""
    return sum(changes(call))


def changes(call: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of a call, in order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read at its first use; it would log every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _levels(changes: Iterable[int]) -> Iterator[int]:
    """The running sum."""
    held = 0
    for change in changes:
        held += change
        yield held
