"""Cache policies as people ask for them: by name, by a mapping of options, or as an object."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from attnzoo.errors import suggest
from attnzoo.kvcache.base import CACHES, CachePolicy
from attnzoo.kvcache.options import current_names
from attnzoo.types import build_config

FULL = "full"

CacheSpec = str | Mapping[str, Any] | CachePolicy
"""A policy's name, {"policy": name, option: value}, or the policy itself."""


@dataclass(frozen=True)
class CacheChoice:
    """A policy's name and options, usable as a dictionary key: requests with equal choices decode together. `config` is
    the policy's own frozen dataclass."""

    policy: str
    config: Any

    @property
    def exact(self) -> bool:
        """Whether nothing is compressed (the policy "full")."""
        return self.policy == FULL

    def build(self) -> CachePolicy:
        """The policy."""
        built: CachePolicy = CACHES.get(self.policy)(self.config)
        return built


def check_mapping(values: Any, where: str) -> None:
    """Raises ValueError if `values` is not a mapping."""
    if not isinstance(values, Mapping):
        raise ValueError(f'{where}={values!r} must be a mapping such as {{"policy": "d2o", "keep_ratio": 0.2}}')


def read_choice(values: Mapping[str, Any], where: str = "cache") -> CacheChoice:
    """{"policy": "d2o", "keep_ratio": 0.2} as a choice.

    Raises ValueError that names the field if `values` is no mapping, for an unknown policy or option, or a value out of
    range.
    """
    check_mapping(values, where)
    policy = values.get("policy")
    if not isinstance(policy, str):
        found = " is missing" if policy is None else f"={str(policy)[:40]} is not a string"
        raise ValueError(f"{where}.policy{found}: name one of {', '.join(sorted(CACHES.names()))}")
    if policy not in CACHES.names():
        raise ValueError(f"{where}.policy={policy!r} is not known{suggest(policy, CACHES.names())}")
    options = {key: value for key, value in values.items() if key != "policy"}
    where = f"cache.{policy}"
    return CacheChoice(policy, build_config(CACHES.get(policy).Config, current_names(options, where), where))


def read_cache(spec: CacheSpec, options: Mapping[str, Any] | None = None) -> CachePolicy:
    """The policy that `spec` names; `options` adds fields of its Config to those in `spec`.

    >>> read_cache("d2o", {"keep_ratio": 0.5}).describe()
    'd2o(keep_ratio=0.5)'

    Raises ValueError that names the field for an unknown policy or option, a value out of its range, an option given
    twice, and options given with a policy object.
    """
    options = dict(options or {})
    if isinstance(spec, CachePolicy):
        if options:
            raise ValueError(
                f"{next(iter(options))}: cache is an object, {spec.describe()}, that has its own options; set them "
                "there, or give the policy's name instead of an object"
            )
        return spec
    values = {"policy": spec} if isinstance(spec, str) else spec
    if not isinstance(values, Mapping):
        raise ValueError(
            f"cache={spec!r} has type {type(spec).__name__}; give a policy's name, a mapping such as "
            '{"policy": "d2o", "keep_ratio": 0.5}, or a policy'
        )
    for name in options:
        if name in values:
            raise ValueError(f"{name}={options[name]!r} is given twice, cache has {name}={values[name]!r}; keep one")
    return read_choice({**values, **options}).build()


def option_names(policy: str) -> list[str]:
    """Names of the options of a policy. Raises ValueError for an unknown one."""
    return [field.name for field in fields(CACHES.get(policy).Config)]
