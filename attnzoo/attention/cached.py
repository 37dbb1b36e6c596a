"""Compressed caches at the seam between attention and model: whose state it is, and all layers' compression at once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from attnzoo.attention.base import Attention
from attnzoo.kvcache import Compression, Layer, State
from attnzoo.kvcache.compressed import CompressedState, reading


def cached_layers(attentions: Sequence[Attention], states: Sequence[Any]) -> list[tuple[int, Layer]]:
    """(index, layer) of the layers whose cache is compressed."""
    found = []
    for index, (attention, state) in enumerate(zip(attentions, states, strict=True)):
        cached = getattr(state, "mixing", None)
        if isinstance(cached, CompressedState):
            found.append((index, Layer(cached, attention.mixing.reader(attention.impl), state.lengths_B)))  # type: ignore[union-attr, operator]
    return found


def compress_layers(attentions: Sequence[Attention], states: Sequence[Any], final: bool) -> tuple[State, ...]:
    """The states after their policy's `compress`; those of exact caches as they are."""
    return _each(attentions, states, lambda policy, layers: policy.compress(layers, final))


def settle_layers(attentions: Sequence[Attention], states: Sequence[Any]) -> tuple[State, ...]:
    """The states after their policy's `settle`; those of exact caches as they are."""
    return _each(attentions, states, lambda policy, layers: policy.settle(layers))


def _each(
    attentions: Sequence[Attention],
    states: Sequence[Any],
    change: Callable[[Compression, list[Layer]], Sequence[State]],
) -> tuple[State, ...]:
    layers = cached_layers(attentions, states)
    out = list(states)
    if layers:
        policy = layers[0][1].state.policy
        for (index, _), new in zip(layers, change(policy, [layer for _, layer in layers]), strict=True):
            out[index] = replace(out[index], mixing=new)
    return tuple(out)


def state_bytes(states: Sequence[Any], prompt: int, tokens: int) -> int:
    """Bytes of one sequence's states once its prompt is compressed and `tokens` more have come, by the policy's byte
    model; `states`: as `init_state` makes them for the prompt, on any device."""
    total = 0
    for state in states:
        total += state.nbytes()
        cached = getattr(state, "mixing", None)
        if isinstance(cached, CompressedState):
            keys = cached.tail.keys_BKSH
            sizes = (1, keys.shape[1], keys.shape[3], prompt, keys.dtype)
            total += cached.policy.compressed_nbytes(*sizes, tokens=tokens) - cached.nbytes()
    return total


def streams(states: Sequence[Any]) -> bool:
    """Whether the prompt is being read and compressed after every chunk."""
    for state in states:
        cached = getattr(state, "mixing", None)
        if isinstance(cached, CompressedState):
            return bool(cached.policy.prefill == "stream") and reading(cached)
    return False
