"""Cache policies: one policy, one file. `base.py` is their contract, `state.py` what all state is made of."""

from attnzoo.kvcache.base import EMPTY, CachePolicy, CacheView
from attnzoo.kvcache.full import FullCache, FullCacheState
from attnzoo.kvcache.state import State, load_state, save_state
from attnzoo.kvcache.window import WindowCache, WindowCacheState

__all__ = [
    "EMPTY",
    "CachePolicy",
    "CacheView",
    "FullCache",
    "FullCacheState",
    "State",
    "WindowCache",
    "WindowCacheState",
    "load_state",
    "save_state",
]
