"""Cache policies, one per file. `base.py` defines their contract, `state.py` the base class of all state.

Every module here is imported, so a new file that registers a policy is found at once.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from attnzoo.kvcache.base import (
    CACHES,
    EMPTY,
    CachedLayer,
    CachePolicy,
    CacheSize,
    CacheState,
    CacheView,
    KVLayer,
    ScoreFunction,
)
from attnzoo.kvcache.full import FullCache, FullCacheState
from attnzoo.kvcache.options import current_names
from attnzoo.kvcache.state import State, load_state, save_state
from attnzoo.kvcache.window import WindowCache, WindowCacheState
from attnzoo.types import build_config

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def build_cache(name: str, options: Mapping[str, Any] | None = None) -> CachePolicy:
    """The policy registered as `name`, configured by `options` (its Config's fields).

    Raises ValueError for an unknown policy or option (with the nearest known one), or a value out of its range.
    """
    cls = CACHES.get(name)
    where = f"cache.{name}"
    policy: CachePolicy = cls(build_config(cls.Config, current_names(options or {}, where), where))
    return policy


__all__ = [
    "CACHES",
    "EMPTY",
    "CachePolicy",
    "CacheSize",
    "CacheState",
    "CacheView",
    "CachedLayer",
    "FullCache",
    "FullCacheState",
    "KVLayer",
    "ScoreFunction",
    "State",
    "WindowCache",
    "WindowCacheState",
    "build_cache",
    "current_names",
    "load_state",
    "save_state",
]
