"""The contract every attention variant keeps.

One function in three forms, and what it costs:

- `forward(x_BTD)`: the parallel form, which trains;
- `init_state` and `extend(chunk, state)`: the same function over any partition of the sequence, which serves;
- `reference(x_BTD)`: the same function in plain sums, which says what is right;
- `cost`: FLOPs, bytes and state bytes, which measured numbers must meet; the memory of training follows from `forward`.

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

from attnzoo.derived_memory import PassMemory, pass_memory, stand_in
from attnzoo.errors import suggest
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.state import State
from attnzoo.ops.common.impl import Impl
from attnzoo.registry import Registry

PositionTrait = Literal["none", "rope", "table", "sinusoid", "bias", "recurrence"]
Growth = Literal["O(T)", "O(window)", "O(1)"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a variant promises; a contract test skips only what a trait rules out.

    causal: no output depends on later tokens. position: where order comes from. growth: how the state grows
    with the context. cross: queries may come from another sequence than keys. varlen: documents packed in one
    row, and padded rows, by `starts_BT`. shift_invariant: adding n to all positions changes nothing.
    """

    causal: bool = True
    position: PositionTrait = "none"
    growth: Growth = "O(T)"
    cross: bool = False
    varlen: bool = False
    shift_invariant: bool = True


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

    @abstractmethod
    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """The parallel form: y_BTD of whole sequences that start at position 0.

        `starts_BT` (int64, variants with the trait varlen): the index of the first token each token may see, for rows
        packed with documents or padded (`attnzoo.ops.common.masks.document_starts` and `padding_starts` make it).
        """

    def check_input(self, x_BTD: Tensor) -> None:
        """Raises ValueError for an input of another shape than [batch, tokens, model_dim]."""
        model_dim = self.config.model_dim
        if x_BTD.dim() != 3 or x_BTD.shape[2] != model_dim:
            raise ValueError(
                f"{type(self).__name__} got x of shape {list(x_BTD.shape)}; it must be [batch, tokens, {model_dim}]"
            )

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
        of padding are undefined. None: all. The given state is consumed.
        """

    @abstractmethod
    def reference(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """`forward` in plain sums, float64-clean: slow, obvious, differentiable."""

    @abstractmethod
    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """Cost of processing `tokens` new tokens of each of `batch` sequences up to length `context`.

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

    def reset_parameters(self, std: float, output_std: float) -> None:
        """Initialises linear maps: normal(0, std), output projection normal(0, output_std)."""


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
        raise ValueError(f"{what} is no subclass of Attention; register a class that is, or of ComposedAttention")
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
