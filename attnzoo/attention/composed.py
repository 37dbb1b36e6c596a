"""A variant as a composition: projection, optional convolution over time, mixing; its three forms follow."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnzoo.attention.base import Attention, Cost, StreamingAttention, Traits, existing
from attnzoo.attention.checks import check_dtype, check_room, check_state
from attnzoo.attention.edits.run import LayerPlan, Placed, row_positions
from attnzoo.attention.edits.traits import Editing
from attnzoo.attention.parts import QKV, ContextState, Mixing, Projection, QKVConv, QKVConvState
from attnzoo.attention.parts.mixing import SoftmaxContext
from attnzoo.kvcache import CachePolicy, KVLayer
from attnzoo.kvcache.state import State, new_zeros, writable
from attnzoo.kvcache.succession import check_current, succeed
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import CAUSAL, Mask
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.types import check_cost_sizes, dtype_bytes, floating


@dataclass
class ComposedState(State):
    """lengths_B: int64 tokens seen so far (the next logical position); conv: carried rows; mixing: its own."""

    lengths_B: Tensor
    conv: QKVConvState | None
    mixing: State

    @property
    def rewinds(self) -> bool:
        return self.mixing.rewinds

    def shares(self, after: Any) -> bool:
        return self.mixing.shares(after.mixing)


class ParallelComposition(Attention):
    """forward, reference and cost from the parts. Subclasses choose the parts in `__init__`, and say which
    implementations there are where a part of their own has fewer and does not say so."""

    implementations: ClassVar[Sequence[str]] = ("reference", "torch", "triton")

    def __init__(self, config: Any, *, projection: Projection, mixing: Mixing, conv: QKVConv | None = None) -> None:
        super().__init__()
        self.config = config
        self.projection = projection
        self.conv = conv
        self.mixing = mixing
        known = type(self).implementations
        self.implementations = tuple(impl for impl in known if impl in mixing.implementations)  # type: ignore[misc]

    @property
    def traits(self) -> Traits:
        return self.mixing.traits

    @property
    def editing(self) -> Editing:
        return self.mixing.editing

    def way_out(self) -> str:
        position = getattr(self.mixing, "position", None)
        if position is None or position.ahead:
            return ""
        return "; scores of keys after the query need max_ahead (a table), or ahead = True (a bias of your own)"

    def forward(
        self,
        x_BTD: Tensor,
        *,
        context_BSD: Tensor | None = None,
        mask: Mask | None = None,
        edits: LayerPlan | None = None,
    ) -> Tensor:
        return self._parallel(x_BTD, context_BSD, mask, self.impl, edits)

    def reference(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        return self._parallel(x_BTD, context_BSD, mask, "reference")

    def _parallel(
        self,
        x_BTD: Tensor,
        context_BSD: Tensor | None,
        mask: Mask | None,
        impl: Impl,
        edits: LayerPlan | None = None,
    ) -> Tensor:
        self.check_input(x_BTD, context_BSD, mask)
        if impl != "reference" and not torch.compiler.is_compiling():
            for what, given in (("x", x_BTD), ("context_BSD", context_BSD)):
                if given is not None:
                    check_dtype(type(self).__name__, what, given, self.projection.query)
        if mask is None:
            mask = CAUSAL if context_BSD is None and self.traits.causal else Mask.full()
        if edits is not None:
            edits.check_context(None if context_BSD is None else context_BSD.shape[1], mask.keys_BS)
        return self._mixed(x_BTD, context_BSD, mask, impl, edits)

    def _mixed(
        self,
        x_BTD: Tensor,
        context_BSD: Tensor | None,
        mask: Mask,
        impl: Impl,
        edits: LayerPlan | None = None,
    ) -> Tensor:
        if edits is not None:
            edits.check_layer(self)
            edits.check_lengths(len(x_BTD), x_BTD.shape[1], mask.starts_BT)
        x_BTD, context_BSD = existing(x_BTD, context_BSD, mask)
        qkv = self.projection(x_BTD, context_BSD)
        if 0 in qkv[0].shape:  # no sequence or no token: kernels and sums over time would have nothing to begin with
            return self.projection.merge(qkv[0].transpose(1, 2))
        if self.conv is not None:
            qkv = self._convolved(qkv, context_BSD is not None, mask, impl)
        if edits is None:
            return self.projection.merge(self.mixing(qkv, mask, impl))
        placed = Placed(row_positions(mask, x_BTD.shape[0], x_BTD.shape[1], x_BTD.device))
        edits.observe(x_BTD, placed)
        whole = edits.replaces(qkv[0].shape[2], placed)
        out_BNTH = None if whole else self.mixing(qkv, mask, impl)
        return self.projection.merge(self.mixing.edited(out_BNTH, qkv, mask, impl, edits))

    def _convolved(self, qkv: QKV, of_context: bool, mask: Mask, impl: Impl) -> QKV:
        """Convolved as if tokens that do not exist were the zeros before a sequence."""
        assert self.conv is not None
        if mask.keys_BS is not None:
            q, k, v = qkv
            gaps = ~mask.keys_BS[:, :, None, None]
            qkv = (q if of_context else q.masked_fill(gaps, 0.0), k.masked_fill(gaps, 0.0), v.masked_fill(gaps, 0.0))
        return self.conv(qkv, mask.starts_BT, impl)

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        check_cost_sizes(batch, tokens, context)
        dtype = self.projection.query.weight.dtype
        width = dtype_bytes(dtype)
        state_bytes = batch * dtype_bytes(torch.int64) + self.mixing.state_bytes(batch, context, dtype)
        flops = self.projection.flops(batch, tokens) + self.mixing.flops(batch, tokens, context)
        if self.conv is not None:
            state_bytes += self.conv.state_bytes(batch, dtype)
            flops += self.conv.flops(batch, tokens)
        parameters = sum(p.numel() for p in self.parameters())
        moved = parameters - self.mixing.unread(context) + 2 * batch * tokens * self.config.model_dim
        return Cost(
            flops=flops,
            bytes_moved=width * moved + state_bytes,
            state_bytes=state_bytes,
            parameters=parameters,
        )

    def reset_parameters(self, std: float, output_std: float) -> None:
        self.projection.reset_parameters(std, output_std)
        self.mixing.reset_parameters(std)
        if self.conv is not None:
            self.conv.reset_parameters()


class ComposedAttention(ParallelComposition, StreamingAttention):
    """All forms from the parts, which stream. This is what most variants are."""

    def kv_layers(self) -> tuple[KVLayer, ...]:
        return self.mixing.kv_layers()

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache: CachePolicy | None = None,
    ) -> ComposedState:
        check_room(type(self).__name__, batch, capacity)
        weight = self.projection.query.weight
        device, dtype = device or weight.device, floating(dtype or weight.dtype)
        return ComposedState(
            new_zeros(batch, device=device, dtype=torch.int64),
            None if self.conv is None else self.conv.init_state(batch, device=device, dtype=dtype),
            self.mixing.init_state(batch, capacity, device=device, dtype=dtype, cache=cache),
        )

    def init_context(self, context_BSD: Tensor, keys_BS: Tensor | None = None) -> ComposedState:
        batch = len(context_BSD)
        self.check_context(context_BSD, batch, keys_BS)
        mask = Mask.full(keys_BS)
        qkv = self.projection(*existing(context_BSD[:, :0], context_BSD, mask))
        conv = None
        if self.conv is not None:
            conv = self.conv.init_state(batch, device=context_BSD.device, dtype=context_BSD.dtype, of_context=True)
            qkv = self._convolved(qkv, True, mask, self.impl)
        lengths_B = new_zeros(batch, device=context_BSD.device, dtype=torch.int64)
        return ComposedState(lengths_B, conv, self.mixing.init_context(qkv, keys_BS, self.impl))

    def extend(
        self,
        x_BTD: Tensor,
        state: ComposedState,
        counts_B: Tensor | None = None,
        *,
        edits: LayerPlan | None = None,
        step: StepInputs | None = None,
    ) -> tuple[Tensor, ComposedState]:
        """As `StreamingAttention.extend`. step: the call as all layers of a model share it, with counts_B; None: this
        layer's own."""
        compiling = torch.compiler.is_compiling()
        self.check_input(x_BTD)
        if not compiling:
            if getattr(state, "_made_by", None) != id(self):
                self.check_state(state)
            check_dtype(type(self).__name__, "x", x_BTD, self.projection.query)
            check_current(state)
        counts_B = counts_B if step is None else step.counts_B
        self.check_chunk(x_BTD, len(state.lengths_B), counts_B)
        state = writable(state, state.lengths_B)
        tokens = x_BTD.shape[1]
        if step is None:
            step = StepInputs.of(state.lengths_B, tokens, counts_B)
        elif step.positions_BT.shape != x_BTD.shape[:2]:
            raise ValueError(f"step is of {list(step.positions_BT.shape)} tokens, and x has {list(x_BTD.shape[:2])}")
        of_context = isinstance(state.mixing, ContextState)
        qkv, conv = self.projection(x_BTD, x_BTD[:, :0] if of_context else None), state.conv
        if 0 in qkv[0].shape:
            return self.projection.merge(qkv[0].transpose(1, 2)), state
        if self.conv is not None and conv is not None:  # both or neither
            qkv, conv = self.conv.extend(qkv, conv, counts_B, self.impl)
        if edits is None:
            o_BNTH, mixing = self.mixing.extend(qkv, state.mixing, step, self.impl)
        else:
            edits.check_layer(self)
            edits.check_streams(self.editing, type(self).__name__)
            exists_BS = state.mixing.exists_BS if isinstance(state.mixing, SoftmaxContext) else None
            edits.check_context(None if exists_BS is None else exists_BS.shape[1], exists_BS)
            edits.observe(x_BTD, edits.placed(step))
            o_BNTH, mixing = self.mixing.extend_edited(qkv, state.mixing, step, self.impl, edits)
        lengths_B = state.lengths_B + (tokens if counts_B is None else counts_B)
        after = ComposedState(lengths_B, conv, mixing)
        if not compiling:
            after._made_by = id(self)
            succeed(state, after)
        return self.projection.merge(o_BNTH), after

    def check_state(self, state: Any) -> None:
        """Raises ValueError for a state of another layer."""
        name = type(self).__name__
        check_state(name, state, ComposedState, {})
        if (self.conv is None) != (state.conv is None):
            raise ValueError(
                f"{name} got the state of another variant, which remembers {'no' if state.conv is None else 'a'} "
                "convolution; begin with this layer's init_state"
            )
        if self.conv is not None:
            rows = (None, self.conv.width - 1, self.conv.heads.num_heads, self.conv.heads.head_dim)
            check_state(name, state.conv, QKVConvState, {"query": rows})
        self.mixing.check_state(name, state.mixing)
