"""Compressed caches at the seam between attention and model: whose state it is, and all layers' compression at once."""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnzoo.attention.base import StreamingAttention
from attnzoo.kvcache import CachedLayer, CachePolicy, State
from attnzoo.kvcache.compressed import CompressedState, reading
from attnzoo.kvcache.succession import check_current, succeed


def cached_state(
    attention: StreamingAttention, batch: int, capacity: int, cache: CachePolicy, *, device: Any, dtype: torch.dtype
) -> State:
    """A layer's empty state whose keys and values `cache` keeps. Raises ValueError where the variant cannot."""
    name = type(attention).__name__
    own = (
        f"cache: {name} keeps a state of its own, not the keys and values of attnzoo.attention.parts, so that "
        f"{cache.describe()} has nothing to compress; use cache=None"
    )
    if "cache" not in inspect.signature(attention.init_state).parameters:
        raise ValueError(own)
    state = attention.init_state(batch, capacity, device=device, dtype=dtype, cache=cache)
    if not isinstance(getattr(state, "mixing", None), CompressedState) or not hasattr(attention, "mixing"):
        raise ValueError(own)
    return state


def cached_layers(attentions: Sequence[StreamingAttention], states: Sequence[Any]) -> list[tuple[int, CachedLayer]]:
    """(index, layer) of the layers whose cache is compressed."""
    found = []
    for index, (attention, state) in enumerate(zip(attentions, states, strict=True)):
        cached = getattr(state, "mixing", None)
        if isinstance(cached, CompressedState):
            found.append((index, CachedLayer(cached, attention.mixing.score_function(attention.impl), state.lengths_B)))
    return found


def compress_layers(attentions: Sequence[StreamingAttention], states: Sequence[Any], final: bool) -> tuple[State, ...]:
    """The states after their policy's `compress`; those of exact caches as they are. Raises ValueError for states that
    have been compressed, or hold no token."""
    for state in states:
        check_current(state)
    for _, layer in cached_layers(attentions, states):
        if not reading(layer.state):
            raise ValueError("compress: this state has been compressed already; extend it, or start a new one")
        if final and not bool((layer.lengths_B > 0).any()):
            raise ValueError("compress: the state holds no token yet; extend it by the prompt first")
    return _each(attentions, states, lambda policy, layers: policy.compress(layers, final))


def joinable_layers(attentions: Sequence[StreamingAttention], states: Sequence[Any]) -> tuple[State, ...]:
    """The states after their policy's `to_joinable`; those of exact caches as they are."""
    return _each(attentions, states, lambda policy, layers: policy.to_joinable(layers))


def _each(
    attentions: Sequence[StreamingAttention],
    states: Sequence[Any],
    change: Callable[[CachePolicy, list[CachedLayer]], Sequence[State]],
) -> tuple[State, ...]:
    layers = cached_layers(attentions, states)
    out = list(states)
    if layers:
        policy = layers[0][1].state.policy
        for (index, _), new in zip(layers, change(policy, [layer for _, layer in layers]), strict=True):
            after = replace(out[index], mixing=new)
            succeed(out[index], after)
            out[index] = after
    return tuple(out)


@dataclass(frozen=True)
class ByteModel:
    """Bytes of one sequence's states under a cache policy. fixed: what no cache is; layers: how many layers have a
    cache of (query heads, kv heads, head dimension, dtype)."""

    policy: CachePolicy
    fixed: int
    layers: dict[tuple[int, int, int, torch.dtype], int]

    @classmethod
    def of(cls, policy: CachePolicy, attentions: Sequence[StreamingAttention], states: Sequence[Any]) -> "ByteModel":
        """`states`: one sequence's, as `init_state` makes them with this policy, on any device."""
        fixed, layers = 0, Counter[tuple[int, int, int, torch.dtype]]()
        for attention, state in zip(attentions, states, strict=True):
            fixed += state.nbytes()
            cached = getattr(state, "mixing", None)
            if isinstance(cached, CompressedState):
                keys = cached.tail.keys_BKSH
                fixed -= cached.nbytes()
                mixing: Any = attention.mixing
                layers[mixing.heads.num_heads, keys.shape[1], keys.shape[3], keys.dtype] += 1
        return cls(policy, fixed, dict(layers))

    def reading(self, room: int) -> int:
        """While a prompt is read, with room for that many tokens, which have come; the queries that are remembered
        included."""
        total = self.fixed
        for (heads, kv_heads, head_dim, dtype), count in self.layers.items():
            total += count * self.policy.nbytes(1, kv_heads, head_dim, room, dtype)
            total += count * self.policy.observed_nbytes(1, heads, head_dim, room, dtype)
        return total

    def compressed(self, prompt: int, tokens: int) -> int:
        """Once the prompt is compressed and joinable, and `tokens` more have come."""
        total = self.fixed
        for (_, kv_heads, head_dim, dtype), count in self.layers.items():
            sizes = (1, kv_heads, head_dim, prompt, dtype)
            total += count * self.policy.compressed_nbytes(*sizes, tokens=tokens, joinable=True)
        return total


def streams(states: Sequence[Any]) -> bool:
    """Whether the prompt is being read and compressed after every chunk."""
    for state in states:
        cached = getattr(state, "mixing", None)
        if isinstance(cached, CompressedState):
            return bool(cached.policy.prefill == "stream") and reading(cached)
    return False
