"""The contract every cache policy keeps.

A policy decides which keys and values of the past stay, where, and in what form. Positions are logical (the index of
the token in its sequence) and survive eviction, so that rotary and relative terms stay right when entries are dropped,
merged or moved.

An exact policy (`ExactCache`: full, window) only appends the new entries and returns what to attend to. A compressing
policy (`CachePolicy`) computes attention itself, because it may store keys and values with fewer channels, and because
it chooses what to keep by queries and softmax weights.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attnzoo.kvcache.state import State
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.paged_decode import Entries
from attnzoo.registry import Registry

EMPTY = -1
"""Logical position of a cache entry that holds nothing."""


@dataclass(frozen=True)
class CacheView:
    """What to attend to.

    keys_BKSH, values_BKSH; positions_BKS: int64 logical positions, `EMPTY` where an entry holds nothing; its K axis is
    1 when all kv heads keep the same entries. alone: the view holds only the new tokens of every row, in order and
    without padding, so that the mask is plainly causal.
    """

    keys_BKSH: Tensor
    values_BKSH: Tensor
    positions_BKS: Tensor
    alone: bool = False


def check_chunk(keys_BKTH: Tensor) -> None:
    """Raises ValueError unless there is at least one sequence and one new token."""
    if keys_BKTH.shape[0] == 0 or keys_BKTH.shape[2] == 0:
        raise ValueError(
            f"keys of shape {tuple(keys_BKTH.shape)} [batch, kv heads, tokens, head_dim]: extend a cache by at least "
            "one token of at least one sequence"
        )


class ExactCache(ABC):
    """A cache that loses nothing its attention variant may read."""

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
        """An empty cache with room for `capacity` tokens per sequence."""

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
"""An optional method of `ScoreFunction`."""


class EditedRead(Protocol):
    """What changes the output of attention over a cache, or reads its weights, once it has been computed."""

    def __call__(self, out_BNTH: Tensor, q_BNTH: Tensor, positions_BT: Tensor, segments: Sequence[Entries]) -> Tensor:
        """The output with edits. positions_BT: of the queries; segments: all entries that were read, with positions."""


class ScoreFunction(Protocol):
    """How a cache policy gets the variant's attention scores. Queries q_BNTH are rotated (RoPE) as cached keys are, and
    have no bias vectors added."""

    impl: Impl

    @property
    def edits(self) -> EditedRead | None:
        """Called wherever attention over the cache has been computed; None: nothing is. What a cache keeps is chosen
        by the attention without edits."""

    @property
    def relative(self) -> bool:
        """Whether scores have terms beyond query . key, such as a position bias."""

    @property
    def says(self) -> frozenset[Need]:
        """Which of `terms` and `tables` the variant has."""

    def attend(self, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor) -> Tensor:
        """Attention output o_BNTH over `view`, by the operation that also reads the full cache."""

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """(content_BNTH, bias_BNTS): the logits are content . k / sqrt(H) + bias."""

    def tables(self, mask: Mask, tokens: int) -> Tables | PairBias | None:
        """The relative terms as tables by distance or as a function of pairs; None for a variant without any."""


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a model whose cache is to be compressed; lengths_B: tokens seen by each sequence."""

    state: Any
    score_function: ScoreFunction
    lengths_B: Tensor


class CachePolicy(ABC):
    """A policy that may keep less than the full cache. `Config`: a frozen dataclass of options; `source` cites the
    paper.

    `prefill` is "oneshot" (the prompt is read with the full cache, then `compress` runs once) or "stream" (`compress`
    also runs after every chunk of the prompt, which lowers peak memory).
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
        """When prompts are compressed: "oneshot" or "stream"."""

    @property
    def merges_uncounted(self) -> bool:
        """Whether an entry may stand for several tokens, and nothing says for how many."""
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """The optional methods of `ScoreFunction` that this policy needs in its configuration."""
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
        """An empty cache with room for `capacity` tokens per sequence before `compress`."""

    @abstractmethod
    def attend(
        self,
        state: Any,
        score_function: ScoreFunction,
        qkv: tuple[Tensor, Tensor, Tensor],
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, State]:
        """Adds the new keys and values and attends: (o_BNTH, new state) for qkv = (q_BNTH, k_BKTH, v_BKTH)."""

    @abstractmethod
    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[State]:
        """The layers' states, compressed, while prompts are read. final: the prompt has ended, not only a chunk of
        it."""

    def why_whole(self, prompt: int, context: int) -> str:
        """Why, in words for users, a sequence of `context` tokens with a prompt of `prompt` was not compressed."""
        return f"{self.describe()} keeps everything"

    def to_joinable(self, layers: Sequence[CachedLayer]) -> list[State]:
        """Converts compressed states to the layout that all sequences of this policy have in the end, so that
        `State.joined` can put them into one batch. Changes outputs by rounding only."""
        return [layer.state for layer in layers]

    @property
    def compiles(self) -> bool:
        """Whether a decode step on a joinable, `ready` state can be compiled: its operations depend on no values."""
        return False

    def ready(self, state: Any, at_B: Tensor) -> Any:
        """A layer's joinable state with room for one more token of each sequence, at positions at_B: the part of a step
        that depends on values. Only policies with `compiles` have it. Raises ValueError for other states."""
        raise NotImplementedError(f"{type(self).__name__} has no step that could be compiled")

    @abstractmethod
    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes that `init` allocates, to the byte."""

    def observed_nbytes(self, batch: int, num_heads: int, head_dim: int, tokens: int, dtype: torch.dtype) -> int:
        """Bytes beyond `nbytes`, for observed queries, while a prompt of `tokens` tokens is read."""
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
        """Exact bytes per layer after `compress` of prompts of `prompt` tokens and `tokens` generated ones, where all
        prompts are equally long and all layers have equal budgets. joinable: after `to_joinable` too."""


CACHES: Registry[Any] = Registry("cache policy")
