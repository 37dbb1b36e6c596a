"""Splits the time of a decode step into products with weights, products with the cache, and the rest."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

WEIGHTS = ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm")
ENTRIES = ("aten::bmm", "aten::_scaled_dot_product_flash_attention_for_cpu")


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of a step. weights: in linear layers; entries: in products with keys and values; rest: softmax, eviction,
    merging, norms, and the interpreter."""

    weights: float = 0.0
    entries: float = 0.0
    rest: float = 0.0


def step_parts(run: Callable[[], None], steps: int, seconds: float) -> StepParts:
    """The parts of a step that takes `seconds` without the profiler. run: makes `steps` steps. The products are
    measured under the profiler on the CPU; the rest is `seconds` without them, so that it has no overhead of the
    profiler."""
    # Otherwise the profiler prints two lines.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        run()
    own = {event.key: event.self_cpu_time_total / 1e6 / steps for event in watched.key_averages()}
    weights, entries = (sum(own.get(name, 0.0) for name in names) for names in (WEIGHTS, ENTRIES))
    return StepParts(weights=weights, entries=entries, rest=seconds - weights - entries)
