"""Time on a device."""

from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Of one run, after three that do not count."""
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / repeats, 3)
