"""Compressed caches at the seam between attention and model: whose state it is, and all layers' compression at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnzoo.attention.base import Attention
from attnzoo.kvcache import Layer, State
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
    layers = cached_layers(attentions, states)
    out = list(states)
    if layers:
        policy = layers[0][1].state.policy
        for (index, _), new in zip(layers, policy.compress([layer for _, layer in layers], final), strict=True):
            out[index] = replace(out[index], mixing=new)
    return tuple(out)


def streams(states: Sequence[Any]) -> bool:
    """Whether the prompt is being read and compressed after every chunk."""
    for state in states:
        cached = getattr(state, "mixing", None)
        if isinstance(cached, CompressedState):
            return bool(cached.policy.prefill == "stream") and reading(cached)
    return False
