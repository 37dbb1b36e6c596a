"""A variant as a composition: projection, optional convolution over time, mixing; its three forms follow."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.base import Attention, Cost, Traits
from attnzoo.attention.parts import Mixing, Projection, QKVConv, QKVConvState
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.recent import recent
from attnzoo.types import dtype_bytes


@dataclass
class ComposedState(State):
    """lengths_B: int64 tokens seen so far (the next logical position); conv: carried rows; mixing: its own."""

    lengths_B: Tensor
    conv: QKVConvState | None
    mixing: State


class ComposedAttention(Attention):
    """forward, extend, reference and cost from the parts. Subclasses choose the parts in `__init__`, and say which
    implementations there are where a part of their own has fewer."""

    implementations = ("reference", "torch", "triton")

    def __init__(self, config: Any, *, projection: Projection, mixing: Mixing, conv: QKVConv | None = None) -> None:
        super().__init__()
        self.config = config
        self.projection = projection
        self.conv = conv
        self.mixing = mixing

    @property
    def traits(self) -> Traits:
        return self.mixing.traits

    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        return self._parallel(x_BTD, starts_BT, self.impl)

    def reference(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        return self._parallel(x_BTD, starts_BT, "reference")

    def _parallel(self, x_BTD: Tensor, starts_BT: Tensor | None, impl: Impl) -> Tensor:
        self.check_input(x_BTD)
        qkv = self.projection(x_BTD)
        if 0 in qkv[0].shape:  # no sequence or no token: kernels and sums over time would have nothing to begin with
            return self.projection.merge(qkv[0].transpose(1, 2))
        if self.conv is not None:
            qkv = self.conv(qkv, starts_BT, impl)
        return self.projection.merge(self.mixing(qkv, starts_BT, impl))

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache: CachePolicy | None = None,
    ) -> ComposedState:
        weight = self.projection.query.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return ComposedState(
            new_zeros(batch, device=device, dtype=torch.int64),
            None if self.conv is None else self.conv.init_state(batch, device=device, dtype=dtype),
            self.mixing.init_state(batch, capacity, device=device, dtype=dtype, cache=cache),
        )

    def extend(
        self, x_BTD: Tensor, state: ComposedState, counts_B: Tensor | None = None
    ) -> tuple[Tensor, ComposedState]:
        self.check_input(x_BTD)
        if (self.conv is None) != (state.conv is None):
            raise ValueError(
                f"{type(self).__name__} got the state of another variant, which remembers "
                f"{'no' if state.conv is None else 'a'} convolution; begin with this layer's init_state"
            )
        tokens = x_BTD.shape[1]
        qkv, conv = self.projection(x_BTD), state.conv
        if 0 in qkv[0].shape:
            return self.projection.merge(qkv[0].transpose(1, 2)), state
        if self.conv is not None and conv is not None:  # both or neither
            qkv, conv = self.conv.extend(qkv, conv, counts_B, self.impl)
        positions_BT = _positions(state.lengths_B, tokens)
        o_BNTH, mixing = self.mixing.extend(qkv, state.mixing, positions_BT, counts_B, self.impl)
        lengths_B = state.lengths_B + (tokens if counts_B is None else counts_B)
        return self.projection.merge(o_BNTH), ComposedState(lengths_B, conv, mixing)

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
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


def _positions(lengths_B: Tensor, tokens: int) -> Tensor:
    """positions_BT of the tokens that come next, one tensor for all layers of a step."""
    if lengths_B.device.type != "cpu" or torch.compiler.is_compiling():  # values would have to be waited for
        return lengths_B[:, None] + torch.arange(tokens, device=lengths_B.device)
    return _positions_after(tuple(lengths_B.tolist()), tokens)


@recent
def _positions_after(lengths: tuple[int, ...], tokens: int) -> Tensor:
    return torch.tensor(lengths)[:, None] + torch.arange(tokens)
