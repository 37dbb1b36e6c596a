"""The contract every attention variant keeps.

`Attention` is one function in two forms, and what it costs:

- `forward(x_BTD)`: the parallel form, which trains; under a mask and over a context where the traits say so;
- `reference(x_BTD)`: the same function in plain sums, which says what is right;
- `cost`: FLOPs, bytes and state bytes, which measured numbers must meet; the memory of training follows from `forward`.

`StreamingAttention` is the same function in a third form:

- `init_state` and `extend(chunk, state)`: over any partition of the sequence, which serves.

`verify_contract` in tests/contract checks all of it for every registered variant.
"""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.checks import check_counts, check_mask, check_tensor
from attnzoo.attention.edits.traits import NO_EDITING, Editing
from attnzoo.derived_memory import PassMemory, pass_memory, stand_in
from attnzoo.errors import suggest
from attnzoo.kvcache import CachePolicy, KVLayer
from attnzoo.kvcache.state import State
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask, MaskField
from attnzoo.registry import Registry

PositionTrait = Literal["none", "rope", "table", "sinusoid", "bias", "recurrence", "paired", "unknown"]
Growth = Literal["O(T)", "O(window)", "O(1)"]
Streaming = Literal["native", "recomputed", "none"]


CAUSAL_ONLY: frozenset[MaskField] = frozenset({"causal"})
DOCUMENTS: frozenset[MaskField] = frozenset({"causal", "starts"})


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a variant promises; a contract test skips only what a trait rules out.

    masks: which masks `forward` takes, by the fields of `Mask` that they may use ("full": not causal). context: keys
    and values may come from another sequence than the queries. position: where order comes from ("paired": token s of a
    context is read together with token s of the sequence). growth: how the state grows with the context.
    shift_invariant: adding n to all positions changes nothing.
    streaming: how `extend` continues a sequence: from what it remembers, by running `forward` over all inputs again, or
    not at all.
    """

    masks: frozenset[MaskField] = CAUSAL_ONLY
    context: bool = False
    position: PositionTrait = "none"
    growth: Growth = "O(T)"
    shift_invariant: bool = True
    streaming: Streaming = "native"

    @property
    def causal(self) -> bool:
        """Whether no output depends on later tokens, unless a mask is asked for under which it does."""
        return "causal" in self.masks

    @property
    def varlen(self) -> bool:
        """Whether documents packed in one row are kept apart, and causal rows may be padded, by `Mask.starts_BT`."""
        return "starts" in self.masks


@dataclass(frozen=True)
class Cost:
    """What a call costs. Sums of costs add up field by field. What training holds is `Attention.training_memory`.

    flops: multiply and add counted apart, in matrix products, convolutions and attention over the pairs that the mask
    leaves; what an implementation computes beyond them and drops is not counted, nor are elementwise operations.
    bytes_moved: a lower bound, what must pass between memory and processor even if all else stays on chip: parameters
    that the call reads, input and output, and the state once. state_bytes: bytes of the state at that context.
    parameters: number of parameters.
    """

    flops: int = 0
    bytes_moved: int = 0
    state_bytes: int = 0
    parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.state_bytes + other.state_bytes,
            self.parameters + other.parameters,
        )


class Attention(nn.Module, ABC):
    """Base of all variants. `source` cites the paper; `Config` is a frozen dataclass whose first field is model_dim.

    implementations: what `impl` may be besides "auto"; plain torch code is "torch". cases: options that the contract
    tests. by_hand: the formula in numpy, `by_hand(config, weights, x_TD)` gives y_TD of one sequence in float64,
    weights by their names in `state_dict`; the contract holds the code to it (variants of the tree have theirs in
    tests/contract/by_hand.py).
    """

    source: ClassVar[str]
    Config: ClassVar[type]
    config: Any
    implementations: ClassVar[Sequence[str]] = ("torch",)
    cases: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    by_hand: ClassVar[Callable[..., Any] | None] = None
    _impl: Impl = "auto"

    @property
    def impl(self) -> Impl:
        """How operations are computed, in forward and extend: "auto" is by device, anything else is what it says.

        Setting it raises ValueError for an implementation that the variant does not have.
        """
        return self._impl

    @impl.setter
    def impl(self, value: Impl) -> None:
        known = ("auto", *self.implementations)
        if value not in known:
            raise ValueError(f"{type(self).__name__} has no implementation {value!r}{suggest(value, known)}")
        self._impl = value

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What this variant, as configured, promises."""

    @property
    def editing(self) -> Editing:
        """What of its attention can be read and edited: `forward` and `extend` then take `edits`."""
        return NO_EDITING

    @abstractmethod
    def forward(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """The parallel form: y_BTD of whole sequences that start at position 0.

        `context_BSD`: where keys and values come from instead of x; every query sees all of it unless the mask says
        otherwise. `mask`: what queries see (`attnzoo.ops.common.masks.Mask`), None: the past, or the whole context. A
        window is an option of the layer, not of the mask given here. Raises ValueError for what the traits rule out.
        """

    @abstractmethod
    def reference(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """`forward` in plain sums, float64-clean: slow, obvious, differentiable."""

    def check_input(self, x_BTD: Tensor, context_BSD: Tensor | None = None, mask: Mask | None = None) -> None:
        """Raises ValueError for an input or context of another shape than [batch, tokens, model_dim], and for a context
        or a mask that the traits rule out."""
        name, model_dim = type(self).__name__, self.config.model_dim
        check_tensor(name, "x", x_BTD, f"[batch, tokens, {model_dim}]")
        if x_BTD.dim() != 3 or x_BTD.shape[2] != model_dim:
            raise ValueError(f"{name} got x of shape {list(x_BTD.shape)}; it must be [batch, tokens, {model_dim}]")
        if context_BSD is not None:
            self.check_context(context_BSD, len(x_BTD))
        if mask is not None:
            check_mask(self, x_BTD, context_BSD, mask)

    def way_out(self) -> str:
        """The end of a message that refuses a context or a mask: what would make it possible."""
        return ""

    def check_context(self, context_BSD: Tensor, batch: int, keys_BS: Tensor | None = None) -> None:
        """Raises ValueError for a context that does not fit `batch` sequences or `keys_BS`, or where the traits rule it
        out."""
        name, expected = type(self).__name__, (batch, self.config.model_dim)
        if not self.traits.context:
            raise ValueError(
                f"context_BSD: {name} as configured reads its own sequence alone (trait context=False); leave it out"
                f"{self.way_out()}"
            )
        check_tensor(name, "context_BSD", context_BSD, f"[batch, tokens, {expected[1]}]")
        if context_BSD.dim() != 3 or (context_BSD.shape[0], context_BSD.shape[2]) != expected:
            raise ValueError(
                f"{name} got context_BSD of shape {list(context_BSD.shape)}; it must be [batch, tokens, model_dim] = "
                f"[{batch}, S, {expected[1]}]"
            )
        if keys_BS is not None:
            check_tensor(name, "keys_BS", keys_BS, "bool, one for each token of the context")
        if keys_BS is not None and (keys_BS.shape != context_BSD.shape[:2] or keys_BS.dtype != torch.bool):
            raise ValueError(
                f"keys_BS is {keys_BS.dtype} of shape {list(keys_BS.shape)}; it must be bool of "
                f"{list(context_BSD.shape[:2])}, one for each token of the context"
            )

    @abstractmethod
    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """Cost of processing `tokens` new tokens of each of `batch` sequences up to length `context`, under the layer's
        own mask and without another sequence to read.

        `tokens == context` is the parallel form (and a prefill); `tokens == 1` is a decode step.
        """

    def training_memory(self, batch: int, tokens: int, dtype: torch.dtype | None = None) -> PassMemory:
        """What `forward` by the implementation "torch" and its backward pass hold, derived from a run without values
        unless it is written (`memory_by_hand`). `dtype`: of weights and activations, None: that of the weights."""
        known = (x.dtype for x in (*self.parameters(), *self.buffers()) if x.is_floating_point())
        dtype = dtype or next(known, torch.get_default_dtype())
        written = self.memory_by_hand(batch, tokens, dtype)
        return self.derived_memory(batch, tokens, dtype) if written is None else written

    def memory_by_hand(self, batch: int, tokens: int, dtype: torch.dtype) -> PassMemory | None:
        """`training_memory` of a variant whose code looks at values, or takes long even without them. None: derived."""
        return None

    def derived_memory(self, batch: int, tokens: int, dtype: torch.dtype) -> PassMemory:
        """`training_memory` from a run without values."""
        x_BTD = torch.empty(batch, tokens, self.config.model_dim, dtype=dtype, device="meta")
        return pass_memory(self, x_BTD, run=run_torch, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name in ("init_state", "extend", "init_context"):  # asked of what does not stream: say why
            raise AttributeError(f"{name}: {_why_not_streaming(self)}")
        return super().__getattr__(name)

    def reset_parameters(self, std: float, output_std: float) -> None:
        """Initialises linear maps: normal(0, std), output projection normal(0, output_std)."""


class StreamingAttention(Attention):
    """What can be continued from a state; `Traits.causal` is True."""

    def kv_layers(self) -> tuple[KVLayer, ...]:
        """Where this variant keeps keys and values that a cache policy may hold, in the order of the caches in its
        state, which then has `lengths_B`; by default nowhere."""
        return ()

    def check_chunk(self, x_BTD: Tensor, batch: int, counts_B: Tensor | None) -> None:
        """Raises ValueError for a chunk that does not fit a state of `batch` sequences, and for counts that are not
        0..T of each."""
        name = type(self).__name__
        if len(x_BTD) != batch:
            raise ValueError(
                f"{name} got {len(x_BTD)} sequences in x, and the state holds {batch}; give a row for each"
            )
        if counts_B is not None:
            check_counts(name, counts_B, batch, x_BTD.shape[1])

    @abstractmethod
    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache: CachePolicy | None = None,
    ) -> State:
        """The empty state of `batch` sequences with room for `capacity` tokens each.

        Device and dtype default to the parameters'. A state grows past its capacity by copying. `cache`: how keys and
        values are kept (`attnzoo.kvcache.build_cache`), None: exactly; only given where asked for. Raises ValueError
        where the variant cannot keep them so.
        """

    @abstractmethod
    def extend(self, x_BTD: Tensor, state: Any, counts_B: Tensor | None = None) -> tuple[Tensor, State]:
        """Continues sequences by a chunk of any length >= 1; returns (y_BTD, new state).

        `counts_B` (int64): how many of the T tokens of each row are real, the rest being right padding; outputs
        of padding are undefined. None: all. The given state is consumed: go on with the one that is returned, and copy
        a state (`state.clone()`) before, to continue it in two ways. A state that another continuation has written over
        is refused (ValueError).
        """

    def init_context(self, context_BSD: Tensor, keys_BS: Tensor | None = None) -> State:
        """The state of sequences that read a context, which is projected once, here: `extend` continues them as
        `forward` with `context_BSD` and `Mask.full(keys_BS)` would.

        `keys_BS` (bool): which tokens of the context exist; None: all. Raises ValueError where the traits rule out a
        context.
        """
        self.check_context(context_BSD, len(context_BSD))
        raise NotImplementedError(f"{type(self).__name__} says context=True and has no init_context")


def streaming(attention: Attention) -> StreamingAttention:
    """The attention, which can be continued from a state. Raises ValueError where it cannot."""
    if isinstance(attention, StreamingAttention):
        return attention
    raise ValueError(_why_not_streaming(attention))


def _why_not_streaming(attention: Attention) -> str:
    name = type(attention).__name__
    if not attention.traits.causal:
        return f"{name} is not causal: it has no streaming form; call it on whole sequences"
    return f"{name} has no streaming form: make it a StreamingAttention, with init_state and extend"


def existing(x_BTD: Tensor, context_BSD: Tensor | None, mask: Mask | None) -> tuple[Tensor, Tensor | None]:
    """(x, context) with zeros for tokens that `keys_BS` says do not exist, whatever stands there."""
    if mask is None or mask.keys_BS is None:
        return x_BTD, context_BSD
    gaps_BS1 = ~mask.keys_BS[..., None]
    if context_BSD is None:
        return x_BTD.masked_fill(gaps_BS1, 0.0), None
    return x_BTD, context_BSD.masked_fill(gaps_BS1, 0.0)


def run_torch(module: nn.Module, x_BTD: Tensor) -> Tensor:
    """`module(x_BTD)`, all attention in it by the implementation "torch" or, where it is written, by what holds as much
    memory as is written."""
    for part in module.modules():
        if not isinstance(part, Attention):
            continue
        if "torch" in part.implementations:
            part.impl = "torch"
        if part is not module:
            written = part.memory_by_hand(x_BTD.shape[0], x_BTD.shape[1], x_BTD.dtype)
            if written is not None:
                part.forward = partial(stand_in, written)  # type: ignore[method-assign]
    out: Tensor = module(x_BTD)
    return out


def check_variant(name: str, cls: Any) -> None:
    """Raises ValueError, saying what is missing, for what cannot be a variant."""
    what = f"attention {name!r}: {getattr(cls, '__name__', repr(cls))}"
    if not (isinstance(cls, type) and issubclass(cls, Attention)):
        raise ValueError(
            f"{what} is no subclass of Attention; register a class that is, or of ComposedAttention, or an nn.Module "
            "with forward(x)"
        )
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; see Attention, or compose it of parts")
    if not isinstance(getattr(cls, "source", None), str):
        raise ValueError(f"{what} lacks `source`: say in one line where the idea is from")
    if not isinstance(cls.cases, Sequence) or not all(isinstance(case, Mapping) for case in cls.cases):
        raise ValueError(
            f"{what}: cases={cls.cases!r} must be a list of options to test, such as ({{'num_heads': 2}},)"
        )
    config = getattr(cls, "Config", None)
    fields = dataclasses.fields(config) if isinstance(config, type) and dataclasses.is_dataclass(config) else ()
    if not fields or fields[0].name != "model_dim":
        raise ValueError(f"{what} lacks `Config`: a frozen dataclass of its options whose first field is model_dim")
    try:
        inspect.signature(cls).bind(None)
    except TypeError as error:
        raise ValueError(f"{what}.__init__ must take its configuration and nothing else ({error})") from None


ATTENTION: Registry[type[Attention]] = Registry("attention", check_variant)
