"""Compressed caches at the seam between attention and model: whose state it is, and all layers' compression at once."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnzoo.attention.base import StreamingAttention
from attnzoo.kvcache import CachedLayer, CachePolicy, CacheSize, CacheState, State
from attnzoo.kvcache.base import caches_of, with_caches
from attnzoo.kvcache.succession import check_current, succeed


def cached_state(
    attention: StreamingAttention, batch: int, capacity: int, cache: CachePolicy, *, device: Any, dtype: torch.dtype
) -> State:
    """A layer's empty state whose keys and values `cache` keeps, in every place where the variant keeps some. Raises
    ValueError where the variant cannot."""
    layers = attention.kv_layers()
    own = (
        f"cache: {type(attention).__name__} keeps a state of its own, not the keys and values of "
        f"attnzoo.attention.parts, so that {cache.describe()} has nothing to compress; use cache=None"
    )
    if "cache" not in inspect.signature(attention.init_state).parameters:
        raise ValueError(own)
    state = attention.init_state(batch, capacity, device=device, dtype=dtype, cache=cache)
    kept = [found.policy is cache for found in caches_of(state)]
    if not kept or len(kept) != len(layers) or not all(kept):
        raise ValueError(own)
    return state


def cached_layers(attention: StreamingAttention, state: Any) -> list[CachedLayer]:
    """The caches of one layer's state that a policy compresses; none where they are exact."""
    caches = list(caches_of(state))
    if all(cache.policy.exact for cache in caches):
        return []
    layers = zip(attention.kv_layers(), caches, strict=True)
    return [CachedLayer(cache, layer.score_function(attention.impl), state.lengths_B) for layer, cache in layers]


def compress_layers(attentions: Sequence[StreamingAttention], states: Sequence[Any], final: bool) -> tuple[State, ...]:
    """The states after their policy's `compress`; those of exact caches as they are. Raises ValueError for states that
    have been compressed, or hold no token."""

    def compressed(policy: CachePolicy, layers: list[CachedLayer]) -> Sequence[CacheState]:
        for layer in layers:
            if not layer.state.reading:
                raise ValueError("compress: this state has been compressed already; extend it, or start a new one")
            if final and not bool((layer.lengths_B > 0).any()):
                raise ValueError("compress: the state holds no token yet; extend it by the prompt first")
        return policy.compress(layers, final)

    for state in states:
        check_current(state)
    return _each(attentions, states, compressed)


def joinable_layers(attentions: Sequence[StreamingAttention], states: Sequence[Any]) -> tuple[State, ...]:
    """The states after their policy's `to_joinable`; those of exact caches as they are."""
    return _each(attentions, states, lambda policy, layers: policy.to_joinable(layers))


def _each(
    attentions: Sequence[StreamingAttention],
    states: Sequence[Any],
    change: Callable[[CachePolicy, list[CachedLayer]], Sequence[CacheState]],
) -> tuple[State, ...]:
    found = [cached_layers(attention, state) for attention, state in zip(attentions, states, strict=True)]
    layers = [layer for some in found for layer in some]
    if not layers:
        return tuple(states)
    changed, out = iter(change(layers[0].state.policy, layers)), []
    for some, state in zip(found, states, strict=True):
        after = with_caches(state, changed) if some else state
        succeed(state, after)
        out.append(after)
    return tuple(out)


@dataclass(frozen=True)
class ByteModel:
    """Bytes of one sequence's states under a cache policy. fixed: what no cache is; layers: how many caches there are
    of each size."""

    policy: CachePolicy
    fixed: int
    layers: dict[CacheSize, int]

    @classmethod
    def of(cls, policy: CachePolicy, attentions: Sequence[StreamingAttention], states: Sequence[Any]) -> "ByteModel":
        """`states`: one sequence's, as `init_state` makes them with this policy, on the device "meta"."""
        fixed, layers = 0, Counter[CacheSize]()
        for attention, state in zip(attentions, states, strict=True):
            fixed += state.nbytes()
            caches = [cache for cache in caches_of(state) if not cache.policy.exact]
            for layer, cache in zip(attention.kv_layers(), caches, strict=True) if caches else ():
                fixed -= cache.nbytes()
                dtype = next(iter(cache.tensors().values())).dtype
                layers[layer.size(1, dtype, "meta")] += 1
        return cls(policy, fixed, dict(layers))

    def reading(self, room: int) -> int:
        """While a prompt is read, with room for that many tokens."""
        return self.fixed + sum(count * self.policy.nbytes(size, room) for size, count in self.layers.items())

    def compressed(self, prompt: int, tokens: int) -> int:
        """Once the prompt is compressed and joinable, and `tokens` more have come."""
        return self.fixed + sum(
            count * self.policy.compressed_nbytes(size, prompt, tokens=tokens, joinable=True)
            for size, count in self.layers.items()
        )


def streams(states: Sequence[Any]) -> bool:
    """Whether the prompt is being read and compressed after every chunk."""
    first = next((cache for state in states for cache in caches_of(state)), None)
    return first is not None and first.policy.prefill == "stream" and first.reading
