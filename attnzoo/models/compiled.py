"""Decode steps through torch.compile, which fuses what a block computes between two matrix products.

For a single token, starting a small operator costs more than computing it, and an evicting cache needs about a hundred
of them. Blocks are compiled, once per kind of block for one sequence and once for several, and not the whole model, so
that compile time does not grow with the number of layers.
"""

import operator
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import LinearMixing
from attnzoo.kvcache import CachePolicy, FullCache
from attnzoo.kvcache.base import caches_of, with_caches
from attnzoo.kvcache.full import compressing
from attnzoo.kvcache.state import State
from attnzoo.models.blocks import Block
from attnzoo.models.decoder_lm import DecoderLM, DecoderState
from attnzoo.models.torch_compiler import has_compiler, vary, without_guards

BUCKET = 64
"""Attention reads the slots of a full cache in multiples of this many, so that its views are rarely made anew."""
SLOT_AXES = "SP"
"""Axes of a state's tensors, by the letters in their names, whose sizes differ between layers and change with time."""
EXPECTED_BATCH, EXPECTED_SLOTS = 16, 1024
"""Sizes that the compiler is told to expect: large enough that loops over a cache run in threads."""

DecodeBlock = Callable[[Block, Tensor, State], Tensor]


class CompiledDecode:
    """The decode step of a model for inference on a CPU; the state is written in place.

    cache: the policy of the states; None: the full cache. It compiles at the first call with one sequence, and at the
    first with several. Raises ValueError for a model or policy whose state cannot be compiled, and without a C++
    compiler.
    """

    def __init__(self, model: DecoderLM, cache: CachePolicy | None = None) -> None:
        cache = compressing(cache)
        if model.embedding.weight.device.type == "cpu" and not has_compiler():
            raise ValueError(
                "compile_decode=True needs a C++ compiler (g++, or another named by the variable CXX), and there is "
                "none: install one or set compile_decode=False"
            )
        for number, block in enumerate(model.layers()):
            _check(block, number, cache)
        self._model = model
        self._kinds = [str(model.config.layer_attention(layer)) for layer in range(model.config.num_layers)]
        self._cache = self._known = cache
        self._compiled: dict[tuple[str, bool, bool], DecodeBlock] = {}
        self._cut: tuple[weakref.ref[DecoderState], int, DecoderState] | None = None
        self._room = 0

    @torch.inference_mode()
    def __call__(self, tokens_B1: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """(hidden_B1D after the final norm, state) after one new token for every row. The state is the given one, or a
        new one where a compressed cache had to grow.

        Raises ValueError for an exact state without room, a compressed one that is not joinable (`DecoderLM.compress`),
        and one of another policy than was compiled for.
        """
        x_B1D = self._model.embedding(tokens_B1)
        if self._cache is not None:
            state = self._ready(state)
        used = state if self._cache is not None else self._used(state)
        for kind, block, layer in zip(self._kinds, self._model.layers(), used.layers, strict=True):
            x_B1D = self._step(kind, block, x_B1D, layer)(block, x_B1D, layer)
        hidden_B1D: Tensor = self._model.norm(x_B1D)
        return hidden_B1D, state

    def _step(self, kind: str, block: Block, x_B1D: Tensor, layer: State) -> DecodeBlock:
        """The compiled code for a layer. Sizes of 1 get their own, as the compiler treats them as constants."""
        key = (kind, len(x_B1D) > 1, _one_slot(layer))
        if key not in self._compiled:
            self._compiled[key] = _compile(_decode_block)
            self._compiled[key](block, *_example(x_B1D, layer))
        return self._compiled[key]

    def _used(self, state: DecoderState) -> DecoderState:
        """Views of the slots that the longest row will fill."""
        needed = int(_lengths(state.layers[0]).max()) + 1
        used = -(-needed // BUCKET) * BUCKET
        if self._cut is None or self._cut[0]() is not state or self._cut[1] != used:
            self._check_policies(state)
            self._cut = (weakref.ref(state, self._forget), used, state.cut(used))
            slots = [x.shape[2] for name, x in self._cut[2].tensors().items() if name.endswith("_BKSH")]
            self._room = min(slots, default=used)
        if needed > self._room:
            # Compiled code would write beyond the cache, where `extend` makes it grow.
            raise ValueError(f"the state has room for {self._room} tokens, not {needed}; give it a larger capacity")
        return self._cut[2]

    def _ready(self, state: DecoderState) -> DecoderState:
        """The state itself, unless a compressed cache needs room."""
        self._check_policies(state)
        layers = [_ready_layer(layer) for layer in state.layers]
        return state if all(map(operator.is_, layers, state.layers)) else replace(state, layers=tuple(layers))

    def _check_policies(self, state: DecoderState) -> None:
        """Raises ValueError for a state of another policy, which compiled code would misread."""
        right = self._cache or FullCache()
        for cache in caches_of(state):
            policy = cache.policy
            if policy is not self._known:
                if type(policy) is not type(right) or policy.config != right.config:
                    asked, given = ("the full cache" if p.exact else p.describe() for p in (right, policy))
                    raise ValueError(f"the step is compiled for states of {asked}, and this one is of {given}")
                self._known = policy

    def _forget(self, _: object) -> None:
        """Drops views once their state is gone, so that they do not keep its memory."""
        self._cut = None


def _one_slot(layer: State) -> bool:
    """Whether a cache has a single slot, a size that the compiler treats as a constant."""
    return any(cache.slots == 1 for cache in caches_of(layer))


def _decode_block(block: Block, x_B1D: Tensor, state: State) -> Tensor:
    x_B1D, after = block.extend(x_B1D, state, None)
    state.fill(after)
    return x_B1D


def _compile(function: DecodeBlock) -> DecodeBlock:
    """A compiled copy of a function. The caller keeps one for every kind of block and every set of sizes that vary, as
    nothing checks that it is the right one."""
    assert isinstance(function, FunctionType)
    # torch keeps compiled code by code object, so every copy needs its own.
    copy = FunctionType(function.__code__.replace(), function.__globals__)
    return without_guards(copy)


def _example(x_B1D: Tensor, layer: State) -> tuple[Tensor, State]:
    """Zeros for a step's input and a layer's state, with sizes that equal no other size, stride or hint.

    The compiler takes equal numbers for the same size or stride, and without guards nothing checks later that they
    still are. In real inputs they may be equal by chance, for example as many sequences as slots.
    """
    tensors = layer.tensors()
    taken = {EXPECTED_BATCH, EXPECTED_SLOTS}
    for tensor in (x_B1D, *tensors.values()):
        taken.update((*tensor.shape, *tensor.stride()))
    batch, slots, capacity = sizes_besides(taken)
    if len(x_B1D) == 1:
        batch = 1

    def like(name: str, tensor: Tensor) -> Tensor:
        sizes = [batch, *tensor.shape[1:]]
        grown = _slot_axes(name, tensor)
        for axis in grown:
            sizes[axis] = capacity
        full = tensor.new_zeros(sizes)
        for axis in grown:
            # Full caches are read as views of their used slots; compressed ones have no slots beyond these.
            full = full[(slice(None),) * axis + (slice(slots),)]
        return full if name.endswith("_BKSH") else full.contiguous()

    x, state = x_B1D.new_zeros(batch, *x_B1D.shape[1:]), layer.map(like)
    _mark_sizes(x, state)
    return x, state


def sizes_besides(taken: set[int]) -> tuple[int, int, int]:
    """Three ascending primes that divide no number of `taken` (sizes, and strides, which are products of sizes)."""
    found: list[int] = []
    number = 3
    while len(found) < 3:
        if all(number % prime for prime in range(2, number)) and all(size % number or size == 0 for size in taken):
            found.append(number)
        number += 2
    return found[0], found[1], found[2]


def _slot_axes(name: str, tensor: Tensor) -> list[int]:
    """Axes whose sizes change with time; to the compiler, a size of 1 or 0 is a constant."""
    letters = re.search(r"_(B[A-Z0-9]*)$", name)
    named = enumerate(letters[1] if letters else "")
    return [axis for axis, letter in named if letter in SLOT_AXES and tensor.shape[axis] > 1]


def _mark_sizes(x_B1D: Tensor, state: State) -> None:
    """Tells the compiler which sizes will vary: the batch where it is above 1, and slots of caches. It decides by the
    sizes it is told to expect, not by those it meets, whether a loop runs in threads."""
    tensors = state.tensors()
    if len(x_B1D) > 1:
        for tensor in (x_B1D, *tensors.values()):
            vary(tensor, 0, EXPECTED_BATCH)
    for name, tensor in tensors.items():
        for axis in _slot_axes(name, tensor):
            vary(tensor, axis, EXPECTED_SLOTS)


def _lengths(layer: State) -> Tensor:
    """lengths_B, which the state of every layer with a cache has."""
    return cast(Tensor, cast(Any, layer).lengths_B)


def _ready_layer(layer: State) -> State:
    caches = list(caches_of(layer))
    ready = [cache.policy.ready(cache, _lengths(layer)) for cache in caches]
    return layer if all(map(operator.is_, ready, caches)) else with_caches(layer, iter(ready))


def _check(block: Block, layer: int, cache: CachePolicy | None) -> None:
    attention = block.attention
    if isinstance(attention, ComposedAttention):
        mixing = attention.mixing
        if isinstance(mixing, LinearMixing):
            return
        layers = attention.kv_layers()
        # Relative terms are looked up by distance, a value that the compiler does not know.
        if layers and all(each.exact.compiles and not each.score_function("auto").relative for each in layers):
            if cache is None or cache.compiles:
                return
            raise ValueError(
                f"layer {layer}: decoding cannot be compiled for {type(cache).__name__}, whose state grows with every "
                "token; choose a policy that keeps a constant number of them, or set compile_decode=False"
            )
    raise ValueError(
        f"layer {layer}: decoding cannot be compiled for {type(attention).__name__} with this configuration; it needs "
        "a variant made of parts, with a matrix as its state, or all keys (no window) and no relative terms: set "
        "compile_decode=False"
    )
