"""The policies that are compared, each with the option that sets its size."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from attnzoo.kvcache import CachePolicy, build_cache

Knob = Literal["keep_ratio", "channel_ratio"]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A policy in the comparison. knob: the option that is adjusted to a budget of bytes (None: none). role: in the
    comparison. observes: whether it has an observation window, whose queries and unpruned keys count as bytes."""

    name: str
    policy: str
    knob: Knob | None
    role: Literal["full", "ours", "control"]
    options: dict[str, Any] = field(default_factory=dict)
    observes: bool = False

    def build(self, ratio: float | None = None) -> CachePolicy:
        """The policy, with its knob set to `ratio`."""
        chosen: dict[str, Any] = {} if self.knob is None or ratio is None else {self.knob: ratio}
        # The budget must hold for short prompts too.
        least: dict[str, Any] = {"min_tokens": 0} if self.knob == "keep_ratio" else {}
        return build_cache(self.policy, {**least, **self.options, **chosen})

    def observing(self, window: int) -> "Contender":
        """The same contender with an observation window of `window` tokens, if it has one."""
        return replace(self, options={**self.options, "window": window}) if self.observes else self


FULL = Contender(name="full", policy="full", knob=None, role="full")
TOKENS = (
    Contender(name="d2o", policy="d2o", knob="keep_ratio", role="ours"),
    Contender(name="d2o, streamed", policy="d2o", knob="keep_ratio", role="ours", options={"prefill": "stream"}),
    Contender(name="snapkv", policy="snapkv", knob="keep_ratio", role="ours", observes=True),
    Contender(name="streaming", policy="streaming", knob="keep_ratio", role="control"),
    Contender(name="random_tokens", policy="random_tokens", knob="keep_ratio", role="control"),
    Contender(
        name="d2o+think",
        policy="d2o+think",
        knob="keep_ratio",
        role="ours",
        options={"channel_ratio": 0.5},
        observes=True,
    ),
)
"""Policies that drop tokens; they can meet any budget."""
PARTS = (
    TOKENS[0],
    Contender(name="d2o, nothing merged", policy="d2o", knob="keep_ratio", role="ours", options={"merge": False}),
    Contender(name="d2o, equal layers", policy="d2o", knob="keep_ratio", role="ours", options={"budget": "uniform"}),
    Contender(name="d2o, half recent", policy="d2o", knob="keep_ratio", role="ours", options={"heavy_ratio": 0.5}),
    Contender(
        name="d2o, all three",
        policy="d2o",
        knob="keep_ratio",
        role="ours",
        options={"merge": False, "budget": "uniform", "heavy_ratio": 0.5},
    ),
    TOKENS[3],
)
"""D2O, D2O without each of the parts that its paper adds to accumulated attention, and streaming for comparison."""
CHANNELS = (
    Contender(name="think", policy="think", knob="channel_ratio", role="ours", observes=True),
    Contender(name="random_channels", policy="random_channels", knob="channel_ratio", role="control", observes=True),
)
"""Policies that drop channels of keys; they keep all values, so that they cannot meet a budget below one half."""
