"""Decides which cache policy a request gets: the server's default, or one that the request may choose within bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from attnzoo.errors import suggest
from attnzoo.kvcache import CACHES, current_names
from attnzoo.kvcache.choice import FULL, CacheChoice, check_mapping, read_choice
from attnzoo.types import checked


class CacheRules:
    """The default cache of requests, and the caches that they may choose.

    bounds: {policy: {option: [least, most]}}, or [value, value, ...] for options that are not numbers. With bounds, a
    request may choose only these policies and set only these options; other options keep the policy's defaults.
    {policy: null} leaves the policy's options free. Without bounds, a request may choose any policy that compresses,
    with any options. The default is always allowed. Options that count tokens are also bounded by what the model can
    hold (`DecoderLM.init_state`). where: the default's name in messages. Raises ValueError that names the field.
    """

    def __init__(
        self, default: Mapping[str, Any] | None, bounds: Mapping[str, Any] | None, where: str = "cache"
    ) -> None:
        self.default = read_choice(default or {"policy": FULL}, where)
        if bounds is not None and not isinstance(bounds, Mapping):
            raise ValueError(f"cache_bounds={bounds!r} must be a mapping of policies to bounds")
        self.bounds = None if bounds is None else {policy: _read_bounds(policy, bounds[policy]) for policy in bounds}

    @property
    def exact(self) -> bool:
        """Whether requests may use the full cache."""
        return self.default.exact or (self.bounds is not None and FULL in self.bounds)

    def choose(self, asked: Mapping[str, Any] | None) -> CacheChoice:
        """The cache for a request (None: the default). Raises ValueError that names the field and allowed values."""
        if asked is None:
            return self.default
        check_mapping(asked, "cache")
        asked = current_names(asked, "cache")
        choice = read_choice(asked)
        if choice != self.default:
            self._check(choice, asked)
        return choice

    def examples(self) -> list[CacheChoice]:
        """One choice of every policy in the bounds, to check at the start that the model supports the policy."""
        return [_example(policy, bounds or {}) for policy, bounds in (self.bounds or {}).items()]

    def _check(self, choice: CacheChoice, asked: Mapping[str, Any]) -> None:
        allowed = [name for name in CACHES.names() if name != FULL] if self.bounds is None else list(self.bounds)
        allowed = sorted({*allowed, self.default.policy})
        if choice.policy not in allowed or (choice.exact and not self.exact):
            raise ValueError(f"cache.policy={choice.policy!r} is not allowed here; choose one of {', '.join(allowed)}")
        if self.bounds is None:
            return
        if choice.policy not in self.bounds:
            raise ValueError(f"cache: of {choice.policy!r} only this server's own options are allowed: {self.default}")
        bounds = self.bounds[choice.policy]
        if bounds is None:
            return
        extra = [option for option in asked if option != "policy" and option not in bounds]
        refusal = "".join(f"; cache.{option} is not for requests to set here" for option in extra)
        for option, bound in bounds.items():
            value = _effective(choice.config, option, bounds)
            if value is not _FREE and not bound.holds(value):
                raise ValueError(f"cache.{option}={value!r} is not allowed here; give {bound}{refusal}")
        if extra:
            named = f"only {', '.join(bounds)} can be" if bounds else "no option can be"
            raise ValueError(
                f"cache.{extra[0]} is not for requests to set here: of {choice.policy!r} {named}; leave it out for its "
                f"default, {getattr(type(choice.config)(), extra[0])!r}"
            )


_FREE = object()
BUDGETS = {"keep_ratio": "max_tokens", "max_tokens": "keep_ratio"}
"""Two ways to give a budget; a request gives one of them."""


def _effective(config: Any, option: str, bounds: Mapping[str, Any]) -> Any:
    """The option's value to compare with its bound; `_FREE` if the request gave the other budget, which has a bound."""
    value = getattr(config, option)
    if value is not None or option not in BUDGETS:
        return value
    if getattr(config, BUDGETS[option]) is None:
        return config.ratio if option == "keep_ratio" else value
    return _FREE if BUDGETS[option] in bounds else value


@dataclass(frozen=True)
class _Bound:
    """The allowed values of an option: a range [least, most] if `numbers`, else a list."""

    values: tuple[Any, ...]
    numbers: bool

    def holds(self, value: Any) -> bool:
        if not self.numbers:
            return value in self.values
        return value is not None and self.values[0] <= value <= self.values[1]

    def __str__(self) -> str:
        if self.numbers:
            return f"a number between {self.values[0]} and {self.values[1]}"
        return f"one of {', '.join(map(repr, self.values))}"


def _example(policy: str, bounds: Mapping[str, _Bound]) -> CacheChoice:
    """The choice of a policy with the least number, or the first value, of every option in its bounds."""
    hints = get_type_hints(CACHES.get(policy).Config)
    options = {}
    for option, bound in bounds.items():
        if BUDGETS.get(option) in options:
            continue
        whole = bound.numbers and float not in (get_args(hints[option]) or (hints[option],))
        options[option] = math.ceil(bound.values[0]) if whole else bound.values[0]
    try:
        return read_choice({"policy": policy, **options}, f"cache_bounds.{policy}")
    except ValueError as error:
        raise ValueError(f"cache_bounds.{policy}: the least that it allows, {options}, is refused: {error}") from None


def _read_bounds(policy: str, options: Any) -> dict[str, _Bound] | None:
    where = f"cache_bounds.{policy}"
    if policy not in CACHES.names():
        policy = str(policy)
        raise ValueError(f"{where}: no such cache policy{suggest(policy, CACHES.names())}")
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}={options!r} must be a mapping of options to [least, most], or empty")
    options = current_names(options, where)
    hints = get_type_hints(CACHES.get(policy).Config)
    known = [field.name for field in fields(CACHES.get(policy).Config)]
    for option in options:
        if option not in known:
            raise ValueError(f"{where}.{option} is no option of {policy}{suggest(str(option), known)}")
    return {option: _read_bound(f"{where}.{option}", value, hints[option]) for option, value in options.items()}


def _read_bound(where: str, value: Any, hint: Any) -> _Bound:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}={value!r} must be a list: [least, most], or the values that are allowed")
    numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    if numbers and (len(value) != 2 or not value[0] <= value[1]):
        raise ValueError(f"{where}={value!r} must be [least, most] with least <= most")
    if numbers and not {int, float} & set(get_args(hint) or (hint,)):
        raise ValueError(f"{where}={value!r}: the option is no number; list the values that are allowed")
    for item in () if numbers else value:
        checked(item, hint, where)
    return _Bound(tuple(value), numbers)
