"""Decode steps through torch's compiler: what lies between two products of a block becomes a few loops.

A single token leaves so little to compute that starting operators costs more than the small ones take. Blocks are
compiled one kind at a time, once for one sequence and once for several, not the model as a whole: seconds, not a
minute.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import LinearMixing, SoftmaxMixing
from attnzoo.kvcache import FullCache
from attnzoo.kvcache.state import State
from attnzoo.models.blocks import Block
from attnzoo.models.decoder_lm import DecoderLM, DecoderState

BUCKET = 64
"""Slots of a cache are attended to in multiples of this many, so that views of them are made now and then."""

DecodeBlock = Callable[[Block, Tensor, State], Tensor]


class CompiledDecode:
    """The decode step of a model for inference on a CPU; the state is written in place.

    Compiles when it is first called with one sequence, and with several. Raises ValueError for a model whose state the
    compiler cannot follow, and where a CPU has no C++ compiler.
    """

    def __init__(self, model: DecoderLM) -> None:
        if model.embedding.weight.device.type == "cpu":
            _check_compiler()
        for number, block in enumerate(model.layers()):
            _check(block, number)
        self._model = model
        self._kinds = [str(model.config.layer_attention(layer)) for layer in range(model.config.num_layers)]
        self._compiled: dict[tuple[str, bool], DecodeBlock] = {}
        self._cut: tuple[DecoderState, int, DecoderState] | None = None
        self._room = 0

    @torch.inference_mode()
    def __call__(self, tokens_B1: Tensor, state: DecoderState) -> Tensor:
        """hidden_B1D after the final norm, one new token for every row of the state.

        Raises ValueError when the state has no room left.
        """
        batch = len(tokens_B1)
        x_B1D = self._model.embedding(tokens_B1)
        layers = self._used(state).layers
        for kind, block, layer in zip(self._kinds, self._model.layers(), layers, strict=True):
            if (kind, batch > 1) not in self._compiled:
                _mark_sizes(x_B1D, layer, batch > 1)
                self._compiled[kind, batch > 1] = _compile(_decode_block)
            x_B1D = self._compiled[kind, batch > 1](block, x_B1D, layer)
        hidden_B1D: Tensor = self._model.norm(x_B1D)
        return hidden_B1D

    def _used(self, state: DecoderState) -> DecoderState:
        """Views of what the longest row will fill."""
        needed = int(state.layers[0].lengths_B.max()) + 1  # type: ignore[attr-defined]
        used = -(-needed // BUCKET) * BUCKET
        if self._cut is None or self._cut[0] is not state or self._cut[1] != used:
            self._cut = (state, used, state.cut(used))
            slots = [x.shape[2] for name, x in self._cut[2].tensors().items() if name.endswith("_BKSH")]
            self._room = min(slots, default=used)
        if needed > self._room:
            # Compiled code would write beyond the cache, where `extend` makes it grow.
            raise ValueError(f"the state has room for {self._room} tokens, not {needed}; give it a larger capacity")
        return self._cut[2]


def _decode_block(block: Block, x_B1D: Tensor, state: State) -> Tensor:
    x_B1D, after = block.extend(x_B1D, state, None)
    state.fill(after)
    return x_B1D


def _compile(function: DecodeBlock) -> DecodeBlock:
    """A compiled copy of a function. It does not check what it was compiled for (that costs as much as all else it
    does besides products): the caller keeps one for every kind of block and number of dimensions that vary."""
    assert isinstance(function, FunctionType)
    # Compiled code is kept by code object, so that kinds need one each.
    copy = FunctionType(function.__code__.replace(), function.__globals__)
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled: DecodeBlock = torch.compile(copy, fullgraph=True, options=options)
    return compiled


def _mark_sizes(x_B1D: Tensor, state: State, several: bool) -> None:
    """Tells the compiler which sizes will vary: slots of caches, and sequences where there are several."""
    for tensor in [x_B1D, *state.tensors().values()]:
        if several:
            torch._dynamo.mark_dynamic(tensor, 0)
    for name, tensor in state.tensors().items():
        if name.endswith("_BKSH"):
            torch._dynamo.mark_dynamic(tensor, 2)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "compile_decode=True needs a C++ compiler (g++, or another named by the variable CXX), and there is none: "
            "install one or set compile_decode=False"
        ) from None


def _check(block: Block, layer: int) -> None:
    attention = block.attention
    if isinstance(attention, ComposedAttention):
        mixing = attention.mixing
        if isinstance(mixing, LinearMixing):
            return
        keeps_all = isinstance(mixing, SoftmaxMixing) and type(mixing.cache) is FullCache
        # Relative terms are looked up by distances, which are values that the compiler does not know.
        if keeps_all and not mixing.position.relative:  # type: ignore[union-attr]
            return
    raise ValueError(
        f"layer {layer}: decoding cannot be compiled for {type(attention).__name__} with this configuration; it needs "
        "a variant made of parts, with a matrix as its state, or all keys (no window) and no relative terms: set "
        "compile_decode=False"
    )
