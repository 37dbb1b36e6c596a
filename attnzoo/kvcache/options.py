"""Options that several policies share, and their ranges."""

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

Prefill = Literal["oneshot", "stream"]

RENAMED = {"votes": "merge_counts", "retail": "repack_every"}
"""Old names of options, which the next release will refuse."""


def current_names(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`options` with current names in place of old ones (FutureWarning). Raises ValueError if both are given."""
    found = dict(options)
    for old, new in RENAMED.items():
        if old in found:
            if new in found:
                raise ValueError(f"{where}.{old} is the old name of {where}.{new}: give the new one alone")
            message = f"{where}.{old} is now called {where}.{new}; the next release refuses the old name"
            warnings.warn(message, FutureWarning, stacklevel=3)
            found[new] = found.pop(old)
    return found


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How many tokens stay. keep_ratio: the part of the prompt that is kept, in (0, 1]; 1 keeps all, generated tokens
    too. max_tokens: number of kept tokens for any prompt; set at most one of the two (default: keep_ratio 0.2).
    min_tokens: number of tokens, generated ones included, that a sequence keeps whatever keep_ratio says; None: a page
    (`compressed.PAGE`), which the shortest sequence takes anyway. sinks: number of first tokens that always stay.
    prefill: "oneshot", or "stream" to compress after every chunk of the prompt."""

    keep_ratio: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    sinks: int = 4
    prefill: Prefill = "oneshot"

    def __post_init__(self) -> None:
        if self.keep_ratio is not None and self.max_tokens is not None:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} and max_tokens={self.max_tokens} are two budgets: set one of them"
            )
        if self.keep_ratio is not None:
            check_ratio("keep_ratio", self.keep_ratio)
        check_least("sinks", self.sinks, 0)
        if self.max_tokens is not None:
            check_least("max_tokens", self.max_tokens, self.least)
        if self.min_tokens is not None:
            check_least("min_tokens", self.min_tokens, 0)
        if self.min_tokens is not None and self.max_tokens is not None:
            raise ValueError(
                f"min_tokens={self.min_tokens} is a lower bound for keep_ratio, and max_tokens={self.max_tokens} "
                "replaces keep_ratio: leave one of them out"
            )

    @property
    def least(self) -> int:
        """The fewest tokens that can be kept: sinks, the window, one to evict and one recent."""
        return self.sinks + max(1, getattr(self, "window", 0)) + 1

    @property
    def ratio(self) -> float | None:
        """keep_ratio with its default, None where max_tokens counts."""
        return 0.2 if self.keep_ratio is None and self.max_tokens is None else self.keep_ratio

    @property
    def lossless(self) -> bool:
        """Whether no token is ever evicted."""
        return self.ratio == 1.0


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """channel_ratio: the part of every key's channels that is kept, in (0, 1]: H - floor((1 - channel_ratio) H) of H.
    value_channel_ratio: the same of values. window: number of newest tokens whose keys keep all channels."""

    channel_ratio: float = 0.5
    value_channel_ratio: float = 1.0
    window: int = 32

    def __post_init__(self) -> None:
        check_ratio("channel_ratio", self.channel_ratio)
        check_ratio("value_channel_ratio", self.value_channel_ratio)
        check_least("window", self.window, 1)


def check_ratio(name: str, value: float) -> None:
    """Raises ValueError outside (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}={value} is the part that is kept: it must be greater than 0 and at most 1")


def check_least(name: str, value: int, least: int) -> None:
    """Raises ValueError below `least`."""
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed of more than 64 bits."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} must fit into 64 bits")


NOT_LENGTHS = {"seed"}
"""Integer options that do not count tokens."""


def check_lengths(config: Any, positions: int) -> None:
    """Raises ValueError for an option that counts more than the `positions` tokens a model can read. Defaults pass.

    Every integer option counts tokens, unless `NOT_LENGTHS` has its name.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        if int not in kinds or field.name in NOT_LENGTHS or value is None:
            continue
        usual = 0 if field.default in (MISSING, None) else field.default
        if value > max(positions, usual):
            raise ValueError(
                f"cache.{field.name}={value} is more than the {positions} tokens that this model can read: give at "
                f"most {positions}"
            )
