"""The contract every attention variant keeps.

One function in three forms, and what it costs:

- `forward(x_BTD)`: the parallel form, which trains;
- `init_state` and `extend(chunk, state)`: the same function over any partition of the sequence, which serves;
- `reference(x_BTD)`: the same function in plain sums, which says what is right;
- `cost`: FLOPs, bytes and state bytes, which measured numbers must meet.

`verify_contract` in tests/contract checks all of it for every registered variant.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnzoo.kvcache.state import State
from attnzoo.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a variant promises; a contract test skips only what a trait rules out.

    causal: no output depends on later tokens. position: where order comes from. growth: how the state grows
    with the context. cross: queries may come from another sequence than keys. varlen: packed documents
    (`cu_seqlens`) in one row. shift_invariant: adding n to all positions changes nothing.
    """

    causal: bool = True
    position: Literal["none", "rope", "table", "sinusoid", "recurrence"] = "none"
    growth: Literal["O(T)", "O(window)", "O(1)"] = "O(T)"
    cross: bool = False
    varlen: bool = False
    shift_invariant: bool = True


@dataclass(frozen=True)
class Cost:
    """What a call costs. Sums of costs add up field by field.

    flops: multiply and add counted apart, in matrix products, convolutions and attention over the pairs that
    causality leaves. bytes_moved: parameters read once, input and output, and state read and written.
    state_bytes: bytes of the state at that context. parameters: number of parameters.
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
    """Base of all variants. `source` cites the paper; `Config` is a frozen dataclass whose first field is model_dim."""

    source: ClassVar[str]
    Config: ClassVar[type]
    config: Any

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What this variant, as configured, promises."""

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """The parallel form: y_BTD of whole sequences that start at position 0."""

    @abstractmethod
    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The empty state of `batch` sequences with room for `capacity` tokens each.

        Device and dtype default to the parameters'. A state grows past its capacity by copying.
        """

    @abstractmethod
    def extend(self, x_BTD: Tensor, state: Any, counts_B: Tensor | None = None) -> tuple[Tensor, State]:
        """Continues sequences by a chunk of any length >= 1; returns (y_BTD, new state).

        `counts_B` (int64): how many of the T tokens of each row are real, the rest being right padding; outputs
        of padding are undefined. None: all. The given state is consumed.
        """

    @abstractmethod
    def reference(self, x_BTD: Tensor) -> Tensor:
        """`forward` in plain sums, float64-clean: slow, obvious, differentiable."""

    @abstractmethod
    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """Cost of processing `tokens` new tokens of each of `batch` sequences up to length `context`.

        `tokens == context` is the parallel form (and a prefill); `tokens == 1` is a decode step.
        """

    def reset_parameters(self, std: float, output_std: float) -> None:
        """Initialises linear maps: normal(0, std), output projection normal(0, output_std)."""


ATTENTION: Registry[type[Attention]] = Registry("attention")
