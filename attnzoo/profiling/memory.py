"""Measures the memory of a call on the CPU from the records of torch's allocator."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak memory of `call` in bytes, beyond what was allocated before it; temporaries inside operators count.

    The profiler records every allocation of torch's CPU allocator, also in the autograd engine's threads, and the
    release of what it saw allocated. A release of an older tensor, or by another thread (as collectives do), is not
    seen. Other allocators (numpy, MKL's buffers, the interpreter) are not counted.
    """
    return max(_levels(changes(call)), default=0)


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes still held when `call` has returned, with its result: what a forward pass saves for the backward pass."""
    return sum(changes(call))


def changes(call: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of a call, in order of time."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # keeps kineto from logging every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _levels(changes: Iterable[int]) -> Iterator[int]:
    """Yields the bytes held after each change."""
    held = 0
    for change in changes:
        held += change
        yield held
