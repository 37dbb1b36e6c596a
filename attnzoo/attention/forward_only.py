"""A plain module as a variant: everything but `forward(x)` is made here.

    @ATTENTION.register("mine")
    class Mine(nn.Module):
        def __init__(self, model_dim: int, num_heads: int = 4): ...
        def forward(self, x_BTD): ...

`ATTENTION.register` makes a variant of it: its options are the parameters of `__init__`, its streaming form keeps the
inputs and runs `forward` over all of them for every chunk, `reference` is `forward` in float64, FLOPs are counted in a
run without values. That is right and slow; `slow_streaming` says what makes it fast.

`forward(x_BTD, mask)` also gets a `Mask` (`attnzoo.ops.common.masks`), `forward(x_BTD, context, mask)` a sequence to
read instead of x as well, or None. By default the mask is causal, or full over a context; `sdpa(q, k, v, mask=mask)` of
`attnzoo.ops.sdpa` computes what any mask says. The class may also have

    causal = False               it reads later tokens: there is no streaming form, and a language model refuses it
    source = "..."               where the idea is from; else the line of the docstring that begins with "Source:"
    cases = ({"num_heads": 2},)  options that the contract tests
    masks = {"causal", "keys"}   which masks a forward with `mask` takes (fields of `Traits.masks`); else all
    flops(batch, tokens)         FLOPs of forward, where they cannot be counted
    reference(x_BTD)             the same function in plain sums
    reset_parameters(std, output_std)   called when a model's weights are drawn; else those of `__init__` stay
    by_hand(config, weights, x_TD)      the formula in numpy, weights by their names in the class's own `state_dict`
"""

import inspect
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Attention, Cost, StreamingAttention, Traits, existing
from attnzoo.attention.checks import check_room, check_state
from attnzoo.attention.forward_trial import PROBE, ForwardFailedError, Trial, exact, try_out, with_tensors
from attnzoo.attention.signature import forward_takes, masks_of, options_of, refuse_unused, source_of
from attnzoo.derived_flops import forward_flops
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.full import with_room
from attnzoo.kvcache.state import State, new_zeros, writable
from attnzoo.kvcache.succession import check_current, succeed
from attnzoo.ops.common.masks import CAUSAL, Mask, MaskField
from attnzoo.types import check_cost_sizes, dtype_bytes, floating


@dataclass
class InputsState(State):
    """inputs_BTD: what the layer was given so far, in the first lengths_B slots of each row; zeros behind. context_BSD:
    the context that is read, if one is, of which exists_BS exist."""

    inputs_BTD: Tensor
    lengths_B: Tensor
    context_BSD: Tensor | None = None
    exists_BS: Tensor | None = None

    def shares(self, after: Any) -> bool:
        return isinstance(after, InputsState) and after.inputs_BTD is self.inputs_BTD

    def cut(self, tokens: int) -> "InputsState":
        return replace(self, inputs_BTD=self.inputs_BTD[:, :tokens])


class ForwardOnly(Attention):
    """A variant around a module that has `forward` and no more. `written`: its class; `takes`: which of context and
    mask its forward takes; `masks`: as in `Traits`."""

    written: ClassVar[type[nn.Module]]
    takes: ClassVar[frozenset[str]]
    masks: ClassVar[frozenset[MaskField]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.module = self.written(**{field.name: getattr(config, field.name) for field in fields(config)})
        if not any(x.is_floating_point() for x in (*self.module.parameters(), *self.module.buffers())):
            self.register_buffer("like", torch.empty(0), persistent=False)  # what says device and dtype
        self._counted: dict[tuple[int, int], int] = {}
        self._tried = False
        self.check_values()

    @property
    def traits(self) -> Traits:
        streams = isinstance(self, RecomputedAttention)
        return Traits(
            masks=self.masks,
            context="context" in self.takes,
            position="unknown",
            growth="O(T)" if streams else "O(1)",
            shift_invariant=False,
            streaming="recomputed" if streams else "none",
        )

    @property
    def _like(self) -> Tensor:
        return next(x for x in (*self.parameters(), *self.buffers()) if x.is_floating_point())

    def forward(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        self.check_input(x_BTD, context_BSD, mask)
        x_BTD, context_BSD = existing(x_BTD, context_BSD, mask)
        return self._run(self.module, x_BTD, context_BSD, mask)

    def reference(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """The class's own, or `forward` on copies in float64 of the weights and of what is given."""
        self.check_input(x_BTD, context_BSD, mask)
        x_BTD, context_BSD = existing(x_BTD, context_BSD, mask)
        own = getattr(self.module, "reference", None)
        if own is not None:
            return self._run(own, x_BTD, context_BSD, mask)
        weights = {name: exact(x) for name, x in self.module.named_parameters()}
        weights |= {name: exact(x).clone() for name, x in self.module.named_buffers()}  # forward may count in them
        call = partial(with_tensors, self.module, weights)
        context_BSD = None if context_BSD is None else context_BSD.double()
        return self._run(call, x_BTD.double(), context_BSD, mask).to(x_BTD.dtype)

    def _run(
        self, call: Callable[..., Any], x_BTD: Tensor, context_BSD: Tensor | None = None, mask: Mask | None = None
    ) -> Tensor:
        """`call(x, ...)` with what it takes, nothing for nothing. Raises ValueError for an output of another shape."""
        if 0 in x_BTD.shape:
            return x_BTD.new_zeros(x_BTD.shape)
        return self._checked(call(x_BTD, **self._given(context_BSD, mask)), x_BTD)

    def _checked(self, out: Any, x_BTD: Tensor) -> Tensor:
        if not isinstance(out, Tensor) or out.shape != x_BTD.shape or not out.is_floating_point():
            found: Any = type(out).__name__
            if isinstance(out, Tensor):
                found = out.dtype if out.shape == x_BTD.shape else list(out.shape)
            raise ValueError(
                f"{type(self).__name__}.forward returned {found} for x of {list(x_BTD.shape)}; it must return one "
                "tensor of the shape of x, of floating-point numbers"
            )
        return out

    def check_values(self) -> None:
        """Raises ValueError, once there are weights, for a forward whose outputs cannot be those of a variant."""
        like = self._like
        if self._tried or like.is_meta:
            return
        x_BTD = like.new_empty(2, PROBE, self.config.model_dim)
        try_out(type(self).__name__, self.module, self._run, self._check_outputs, x_BTD)
        self._tried = True

    def _check_outputs(self, trial: Trial, x_BTD: Tensor, context_BSD: Tensor) -> None:
        with suppress(ForwardFailedError):  # it may be for another number of tokens
            trial.outputs(x_BTD)

    def _given(self, context_BSD: Tensor | None, mask: Mask | None) -> dict[str, Any]:
        """What forward takes beside x."""
        if mask is None:
            own = context_BSD is None and "causal" in self.masks
            mask = CAUSAL if own else Mask.full()
        return {name: value for name, value in (("context", context_BSD), ("mask", mask)) if name in self.takes}

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """A chunk of any length runs forward over all of the context. FLOPs are counted, pairs that a mask hides
        included; bytes are those of parameters, input, output and state."""
        check_cost_sizes(batch, tokens, context)
        width, model_dim = dtype_bytes(self._like.dtype), self.config.model_dim
        state_bytes = self._state_bytes(batch, context)
        parameters = sum(p.nbytes for p in self.parameters())
        return Cost(
            flops=self._flops(batch, context),
            bytes_moved=parameters + 2 * width * batch * tokens * model_dim + state_bytes,
            state_bytes=state_bytes,
            parameters=sum(p.numel() for p in self.parameters()),
        )

    def _state_bytes(self, batch: int, capacity: int) -> int:
        return 0

    def _flops(self, batch: int, tokens: int) -> int:
        own = getattr(self.module, "flops", None)
        if own is not None:
            return int(own(batch, tokens))
        key = (batch, tokens)
        if key not in self._counted:
            x_BTD = torch.empty(batch, tokens, self.config.model_dim, dtype=self._like.dtype, device="meta")
            given = self._given(None, None)
            check = partial(self._checked, x_BTD=x_BTD)
            self._counted[key] = forward_flops(self.module, x_BTD, check=check, **given) if x_BTD.numel() else 0
        return self._counted[key]

    def reset_parameters(self, std: float, output_std: float) -> None:
        own = getattr(self.module, "reset_parameters", None)
        if own is not None and len(inspect.signature(own).parameters) == 2:
            own(std, output_std)


class RecomputedAttention(ForwardOnly, StreamingAttention):
    """A causal one: it streams by running `forward` over all inputs so far."""

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache: CachePolicy | None = None,
    ) -> InputsState:
        if cache is not None:
            raise ValueError(
                f"cache: {type(self).__name__} keeps a state of its own, the inputs of its forward, and no keys and "
                "values to compress; use cache=None, or build it from attnzoo.attention.parts"
            )
        check_room(type(self).__name__, batch, capacity)
        self.check_values()
        device, dtype = device or self._like.device, floating(dtype or self._like.dtype)
        return InputsState(
            new_zeros(batch, capacity, self.config.model_dim, device=device, dtype=dtype),
            new_zeros(batch, device=device, dtype=torch.int64),
        )

    def init_context(self, context_BSD: Tensor, keys_BS: Tensor | None = None) -> InputsState:
        self.check_context(context_BSD, len(context_BSD), keys_BS)
        if keys_BS is None:
            keys_BS = torch.ones(context_BSD.shape[:2], dtype=torch.bool, device=context_BSD.device)
        state = self.init_state(len(context_BSD), 0, device=context_BSD.device, dtype=context_BSD.dtype)
        context_BSD = context_BSD.masked_fill(~keys_BS[..., None], 0.0)
        return replace(state, context_BSD=context_BSD, exists_BS=keys_BS.clone())

    def extend(self, x_BTD: Tensor, state: InputsState, counts_B: Tensor | None = None) -> tuple[Tensor, InputsState]:
        self.check_input(x_BTD)
        width = (None, None, self.config.model_dim)
        check_state(type(self).__name__, state, InputsState, {"inputs_BTD": width})
        self.check_chunk(x_BTD, len(state.lengths_B), counts_B)
        check_current(state)
        state = writable(state, state.lengths_B)
        if 0 in x_BTD.shape:
            return x_BTD.new_zeros(x_BTD.shape), state
        tokens = x_BTD.shape[1]
        positions_BT = state.lengths_B[:, None] + torch.arange(tokens, device=x_BTD.device)
        ends_B = state.lengths_B + (tokens if counts_B is None else counts_B)
        used = max(int(ends_B.max()), 1)
        inputs_BTD = with_room(state.inputs_BTD, used, x_BTD)
        rows_BT = torch.arange(len(x_BTD), device=x_BTD.device)[:, None].expand_as(positions_BT)
        if counts_B is None:
            inputs_BTD[rows_BT, positions_BT] = x_BTD.to(inputs_BTD.dtype)
        else:
            real_BT = positions_BT < ends_B[:, None]
            inputs_BTD[rows_BT[real_BT], positions_BT[real_BT]] = x_BTD[real_BT].to(inputs_BTD.dtype)
        # Shorter rows end in zeros, which no real token reads.
        shown = None if state.exists_BS is None else Mask.full(state.exists_BS)
        out_BTD = self._run(self.module, inputs_BTD[:, :used].to(x_BTD.dtype), state.context_BSD, shown)
        after = replace(state, inputs_BTD=inputs_BTD, lengths_B=ends_B)
        succeed(state, after)
        return out_BTD[rows_BT, positions_BT.clamp(max=used - 1)], after

    def _state_bytes(self, batch: int, capacity: int) -> int:
        row = capacity * self.config.model_dim * dtype_bytes(self._like.dtype)
        return batch * (row + dtype_bytes(torch.int64))

    def _check_outputs(self, trial: Trial, x_BTD: Tensor, context_BSD: Tensor) -> None:
        trial.check_alone(x_BTD)
        trial.check_prefixes(x_BTD)
        if "context" in self.takes:
            trial.check_prefixes(x_BTD, context_BSD)


MOST_TRIED = 1 << 26
"""Parameters of the largest layer that `try_forward` builds: 256 MiB."""


def try_forward(shapes: Attention) -> None:
    """Builds a layer that has shapes alone once more, with weights, so that what its forward computes is looked at now.
    Raises ValueError as building it does; a large layer, and a variant that writes all of the contract, are not tried.
    """
    if isinstance(shapes, ForwardOnly) and sum(x.numel() for x in shapes.parameters()) <= MOST_TRIED:
        with torch.random.fork_rng(devices=[]):
            type(shapes)(shapes.config)


def as_variant(item: Any) -> Any:
    """A plain module's class as a variant; anything else as it is. Raises ValueError, naming what is unclear, for a
    class of which no variant can be made."""
    if not (isinstance(item, type) and issubclass(item, nn.Module)) or issubclass(item, Attention):
        return item
    causal = getattr(item, "causal", True)
    if not isinstance(causal, bool):
        raise ValueError(f"{item.__name__}.causal is {causal!r}; it must be True or False, for the whole class")
    refuse_unused(item)
    takes = forward_takes(item)
    base = RecomputedAttention if causal else ForwardOnly
    body: dict[str, Any] = {
        "__doc__": item.__doc__ or "A forward pass without a description.",
        "__module__": item.__module__,
        "__qualname__": item.__qualname__,
        "written": item,
        "takes": takes,
        "masks": masks_of(item, takes, causal),
        "Config": options_of(item),
        "source": source_of(item),
        "cases": getattr(item, "cases", ({},)),
    }
    by_hand = getattr(item, "by_hand", None)
    if by_hand is not None:
        body["by_hand"] = staticmethod(_with_own_names(by_hand))
    return types.new_class(item.__name__, (base,), exec_body=lambda scope: scope.update(body))


def _with_own_names(by_hand: Callable[..., Any]) -> Callable[..., Any]:
    def call(config: Any, weights: Mapping[str, Any], x_TD: Any) -> Any:
        return by_hand(config, {name.removeprefix("module."): value for name, value in weights.items()}, x_TD)

    return call
