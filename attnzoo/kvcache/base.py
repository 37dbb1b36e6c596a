"""The contract every cache policy keeps.

A policy decides which keys and values of the past stay, where, and in what form. Positions are logical (the index of
the token in its sequence) and survive eviction, so that rotary and relative terms stay right when entries are dropped,
merged or moved.

Exact policies (`ExactCache`: full, window) are asked for one thing: append the new entries and return what to attend
to. Compressing ones (`CachePolicy`) attend themselves, because what they keep is not always keys and values of full
width, and because they decide by what queries and softmax weights say.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attnzoo.kvcache.state import State
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import CausalMask
from attnzoo.ops.common.row_blocks import Tables
from attnzoo.registry import Registry

EMPTY = -1
"""Logical position of a cache entry that holds nothing."""


@dataclass(frozen=True)
class CacheView:
    """What to attend to.

    keys_BKSH, values_BKSH; positions_BKS: int64 logical positions, `EMPTY` where an entry holds nothing; its
    K axis is 1 when all kv heads keep the same entries. alone: the entries are the new tokens of every row, in order
    and without padding, so that causality is all there is to a mask of positions.
    """

    keys_BKSH: Tensor
    values_BKSH: Tensor
    positions_BKS: Tensor
    alone: bool = False


def check_chunk(keys_BKTH: Tensor) -> None:
    """Raises ValueError for no sequences, or no tokens of them."""
    if keys_BKTH.shape[0] == 0 or keys_BKTH.shape[2] == 0:
        raise ValueError(
            f"keys of shape {tuple(keys_BKTH.shape)} [batch, kv heads, tokens, head_dim]: a cache is extended by one "
            "token at least, of one sequence at least"
        )


class ExactCache(ABC):
    """One way to keep keys and values."""

    @abstractmethod
    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> State:
        """An empty cache with room for `capacity` tokens a sequence."""

    @abstractmethod
    def append(
        self,
        state: Any,
        keys_BKTH: Tensor,
        values_BKTH: Tensor,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[State, CacheView]:
        """Adds the first `counts_B[b]` (None: all) new entries of each row and returns what to attend to.

        `positions_BT` are the logical positions of the new entries.
        """

    @abstractmethod
    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes that `init` allocates, to the byte."""


Need = Literal["terms", "tables"]
"""A method of `ScoreFunction` that not every variant has."""


class ScoreFunction(Protocol):
    """What attention lends to a compression: its scores. q_BNTH as they meet cached keys (rotated, nothing added)."""

    impl: Impl

    @property
    def relative(self) -> bool:
        """Whether scores have terms besides content . key."""

    @property
    def says(self) -> frozenset[Need]:
        """Which of `terms` and `tables` the variant has."""

    def attend(self, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor) -> Tensor:
        """o_BNTH by the variant's own operation, the same that reads the full cache."""

    def terms(self, q_BNTH: Tensor, mask: CausalMask) -> tuple[Tensor, Tensor | None]:
        """(content_BNTH, bias_BNTS): the logits are content . k / sqrt(H) + bias."""

    def tables(self, mask: CausalMask, tokens: int) -> Tables | None:
        """The relative terms by distance, None without any."""


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a model whose cache is to be compressed; lengths_B: tokens seen by each sequence."""

    state: Any
    score_function: ScoreFunction
    lengths_B: Tensor


class CachePolicy(ABC):
    """A policy that keeps less than all. `Config` is a frozen dataclass of options; `source` cites the paper.

    `prefill` is "oneshot" (the prompt is read with the full cache, `compress` ends it) or "stream" (it is compressed
    after every chunk too, so that the peak falls).
    """

    source: ClassVar[str]
    Config: ClassVar[type]
    config: Any

    def describe(self) -> str:
        """The policy's name and the options that are not defaults, for messages and files."""
        usual = type(self.config)()
        told = [(f.name, getattr(self.config, f.name)) for f in fields(self.config)]
        options = ", ".join(f"{name}={value!r}" for name, value in told if value != getattr(usual, name))
        return f"{CACHES.name_of(type(self))}({options})"

    @property
    @abstractmethod
    def prefill(self) -> str:
        """When prompts are compressed."""

    @property
    def needs(self) -> frozenset[Need]:
        """What of a `ScoreFunction` this policy, as configured, cannot do without, besides `attend`."""
        return frozenset()

    @abstractmethod
    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> State:
        """An empty cache with room for `capacity` tokens a sequence until `compress`."""

    @abstractmethod
    def attend(
        self,
        state: Any,
        score_function: ScoreFunction,
        qkv: tuple[Tensor, Tensor, Tensor],
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Adds the new entries and attends: (o_BNTH, state) from (q_BNTH, k_BKTH, v_BKTH)."""

    @abstractmethod
    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[State]:
        """The layers' states, smaller; `final`: the prompt has ended (else only a chunk of it has). Their prompts are
        still being read."""

    def why_whole(self, prompt: int, context: int) -> str:
        """Why nothing was left out of a prompt of this length, and of a sequence that has come to `context` tokens."""
        return f"{self.describe()} keeps everything"

    def to_joinable(self, layers: Sequence[CachedLayer]) -> list[State]:
        """The layers' states, after `compress`, with the tensors that all sequences of this policy end up with, so that
        they can stand in one state beside others (`State.joined`). Changes no output beyond rounding."""
        return [layer.state for layer in layers]

    @property
    def compiles(self) -> bool:
        """Whether a decode step is the same operations whatever the values, once a state is joinable and `ready`."""
        return False

    def ready(self, state: Any, at_B: Tensor) -> Any:
        """A layer's joinable state with room for one more token of each sequence, at these positions: what a step would
        look up values for. For policies that compile. Raises ValueError for a state that is not joinable."""
        raise NotImplementedError(f"{type(self).__name__} has no step that could be compiled")

    @abstractmethod
    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes that `init` allocates, to the byte."""

    def observed_nbytes(self, batch: int, num_heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
        """Bytes that come to those of `init` while a prompt of this length is read, by query heads."""
        return 0

    @abstractmethod
    def compressed_nbytes(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        prompt: int,
        dtype: torch.dtype,
        *,
        tokens: int = 0,
        joinable: bool = False,
    ) -> int:
        """Bytes a layer of state after `compress` of prompts of this length and `tokens` more tokens, to the byte, for
        prompts of equal lengths and equal budgets of layers. joinable: after `to_joinable` too."""


CACHES: Registry[Any] = Registry("cache policy")
