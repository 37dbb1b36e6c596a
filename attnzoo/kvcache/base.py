"""The one contract of caches: what a policy decides, and the state in which it keeps keys and values.

A policy decides which keys and values of the past stay, where, and in what form. Positions are logical (the index of
the token in its sequence) and survive eviction, so that rotary and relative terms stay right when entries are dropped,
merged or moved.

One sequence's life: `init` makes an empty state; `attend` adds the new keys and values and reads what is kept, for
chunks of a prompt and for single tokens alike; `compress` ends the prompt. An exact policy (full, window: `exact`)
loses nothing that its variant may read, belongs to the variant, and does nothing in `compress`. What is kept of a layer
is a `CacheState` of the policy's own, whose fields are what this policy needs and no others. Which slots hold an entry
is said by a number of slots (`held_B`, `starts_B`, a sequence's length) or by a boolean, never by a coded number.

A variant says where it keeps keys and values (`StreamingAttention.kv_layers`), and a policy what it needs of them
(`needs`), so that a policy either works in all of these layers or is refused before the first token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from attnzoo.kvcache.state import STATIC, State, new_zeros, rebuilt
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.paged_decode import Entries
from attnzoo.registry import Registry
from attnzoo.types import accumulation_dtype

EMPTY = -1
"""Logical position, in a view, of a slot that holds nothing."""


@dataclass(frozen=True)
class NewTokens:
    """New tokens of every sequence: their queries, keys and values, and where they stand."""

    q_BNTH: Tensor
    k_BKTH: Tensor
    v_BKTH: Tensor
    step: StepInputs

    @property
    def tokens(self) -> int:
        """T."""
        return self.step.tokens


@dataclass(frozen=True)
class CacheView:
    """What to attend to.

    keys_BKSH, values_BKSH; positions_BKS: int64 logical positions, `EMPTY` where an entry holds nothing; its K axis is
    1 when all kv heads keep the same entries. alone: the view holds only the new tokens of every row, in order and
    without padding, so that the mask is plainly causal. mask: what the step's queries see of the entries, where layers
    share it; None: each layer makes its own (`shown`).
    """

    keys_BKSH: Tensor
    values_BKSH: Tensor
    positions_BKS: Tensor
    alone: bool = False
    mask: Mask | None = None

    def shown(self, mask: Mask, positions_BT: Tensor) -> Mask:
        """What queries at these positions see of the entries under a layer's mask."""
        return self.mask or replace(mask, query_positions_BT=positions_BT, key_positions_BKS=self.positions_BKS)


@dataclass(frozen=True)
class CacheSize:
    """The sizes of one layer's cache of `batch` sequences, and what it is made of."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device | str | None = None

    @property
    def sums(self) -> torch.dtype:
        """The dtype of sums, such as accumulated attention."""
        return accumulation_dtype(self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of [batch, *shape], by default in the dtype of keys."""
        return new_zeros(self.batch, *shape, device=self.device, dtype=dtype or self.dtype)

    def heads(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros of [batch, num_kv_heads, *shape]."""
        return self.zeros(self.num_kv_heads, *shape, dtype=dtype)


@dataclass(frozen=True)
class Occupied:
    """What one sequence occupies in a layer's cache. tokens: how many have keys and values stored, in the kv head that
    stores most; nbytes: bytes of these, with all that is stored for them; thinned: whether some lost channels."""

    tokens: int
    nbytes: int
    thinned: bool = False


@dataclass
class CacheState(State, ABC):
    """What a policy keeps of one layer. policy: the policy, which files of the state name."""

    policy: Any = field(default=None, kw_only=True, compare=False, metadata=STATIC)

    @property
    @abstractmethod
    def heads(self) -> tuple[int, int]:
        """(kv heads, head_dim) of the keys."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many entries there is room for, besides the newest ones where these are kept apart."""

    @property
    def reading(self) -> bool:
        """Whether a prompt is being read, which `CachePolicy.compress` ends."""
        return False

    @abstractmethod
    def occupied(self, row: int, length: int) -> Occupied:
        """`Occupied` of the sequence in `row`, which has seen `length` tokens. Slots without an entry do not count."""


S = TypeVar("S")


def caches_of(node: Any) -> Iterator[CacheState]:
    """All caches in a state's tree, in order."""
    if isinstance(node, CacheState):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from caches_of(item)
    elif isinstance(node, State):
        for item in vars(node).values():
            if isinstance(item, State | tuple):
                yield from caches_of(item)


def with_caches(node: S, new: Iterator[CacheState]) -> S:
    """The tree with the caches of `new`, in order, in place of its own."""
    if isinstance(node, CacheState):
        return cast(S, next(new))
    if isinstance(node, tuple):
        return cast(S, tuple(with_caches(item, new) for item in node))
    return rebuilt(node, lambda _, item: with_caches(item, new)) if isinstance(node, State) else node


def check_chunk(keys_BKTH: Tensor) -> None:
    """Raises ValueError unless there is at least one sequence and one new token."""
    if keys_BKTH.shape[0] == 0 or keys_BKTH.shape[2] == 0:
        raise ValueError(
            f"keys of shape {tuple(keys_BKTH.shape)} [batch, kv heads, tokens, head_dim]: extend a cache by at least "
            "one token of at least one sequence"
        )


Need = Literal["terms", "tables"]
"""An optional method of `ScoreFunction`."""


class EditedRead(Protocol):
    """What changes the output of attention over a cache, or reads its weights, once it has been computed."""

    def __call__(self, out_BNTH: Tensor, q_BNTH: Tensor, positions_BT: Tensor, segments: Sequence[Entries]) -> Tensor:
        """The output with edits. positions_BT: of the queries; segments: all entries that were read, with positions."""

    def over(
        self,
        q_BNTH: Tensor,
        view: CacheView,
        positions_BT: Tensor,
        attend: Callable[[Tensor, CacheView, Tensor], Tensor],
    ) -> Tensor:
        """Attention over a view of whole entries, with edits; without, it is `attend`."""


class ScoreFunction(Protocol):
    """How a cache policy gets the variant's attention scores. Queries q_BNTH are rotated (RoPE) as cached keys are, and
    have no bias vectors added."""

    @property
    def impl(self) -> Impl:
        """The implementation of operations."""

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


def attend_view(score_function: ScoreFunction, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor) -> Tensor:
    """o_BNTH over whole entries, with edits where there are any."""
    if score_function.edits is None:
        return score_function.attend(q_BNTH, view, positions_BT)
    return score_function.edits.over(q_BNTH, view, positions_BT, score_function.attend)


@dataclass(frozen=True)
class KVLayer:
    """A place where a variant keeps keys and values: their sizes, the variant's own exact cache, and its scores by
    implementation."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    exact: "CachePolicy"
    score_function: Callable[[Impl], ScoreFunction]

    def size(self, batch: int, dtype: torch.dtype, device: torch.device | str | None = None) -> CacheSize:
        """The sizes of its cache of `batch` sequences."""
        return CacheSize(batch, self.num_heads, self.num_kv_heads, self.head_dim, dtype, device)


@dataclass(frozen=True)
class CachedLayer:
    """One layer of a model whose cache is to be compressed; lengths_B: tokens seen by each sequence."""

    state: Any
    score_function: ScoreFunction
    lengths_B: Tensor


class CachePolicy(ABC):
    """Which keys and values stay. `Config`: a frozen dataclass of options; `source` cites the paper.

    exact: nothing is lost that the variant may read. prefill: when prompts are compressed: "oneshot" (the prompt is
    read with everything kept, then `compress` runs once) or "stream" (`compress` also runs after every chunk of the
    prompt, which lowers peak memory). compiles: a decode step on a joinable, `ready` state can be compiled, as its
    operations depend on no values.
    """

    source: ClassVar[str]
    Config: ClassVar[type]
    config: Any
    exact: ClassVar[bool] = False
    prefill: str = "oneshot"
    compiles: bool = False

    def describe(self) -> str:
        """The policy's name and the options that are not defaults, for messages and files."""
        usual = type(self.config)()
        told = [(f.name, getattr(self.config, f.name)) for f in fields(self.config)]
        options = ", ".join(f"{name}={value!r}" for name, value in told if value != getattr(usual, name))
        return f"{CACHES.name_of(type(self))}({options})"

    @property
    def merges_uncounted(self) -> bool:
        """Whether an entry may stand for several tokens, and nothing says for how many."""
        return False

    @property
    def resumes(self) -> int | None:
        """How many last tokens of a prompt must be read with this policy, where those before them were read without
        it: 0 for a policy that decides at the end of the prompt by what it keeps. None: it must read all of them."""
        return 0 if self.exact else None

    @property
    def needs(self) -> frozenset[Need]:
        """The optional methods of `ScoreFunction` that this policy needs in its configuration."""
        return frozenset()

    @abstractmethod
    def init(self, size: CacheSize, capacity: int) -> CacheState:
        """An empty cache with room for `capacity` tokens per sequence before `compress`."""

    @abstractmethod
    def attend(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, CacheState]:
        """Adds the new keys and values, and attends: (o_BNTH, new state)."""

    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[CacheState]:
        """The layers' states, compressed, while prompts are read. final: the prompt has ended, not only a chunk of
        it."""
        return [layer.state for layer in layers]

    def why_whole(self, prompt: int, context: int) -> str:
        """Why, in words for users, a sequence of `context` tokens with a prompt of `prompt` was not compressed."""
        return f"{self.describe()} keeps everything"

    def to_joinable(self, layers: Sequence[CachedLayer]) -> list[CacheState]:
        """Converts compressed states to the layout that all sequences of this policy have in the end, so that
        `State.joined` can put them into one batch. Changes outputs by rounding only."""
        return [layer.state for layer in layers]

    def ready(self, state: Any, at_B: Tensor) -> Any:
        """A layer's joinable state with room for one more token of each sequence, at positions at_B: the part of a step
        that depends on values. Raises ValueError for states that are not joinable."""
        return state

    def kept(self, context: int) -> int:
        """How many of `context` tokens an exact policy keeps."""
        return context

    def nbytes(self, size: CacheSize, capacity: int) -> int:
        """Bytes that `init` allocates."""
        return self.init(replace(size, device="meta"), capacity).nbytes()

    @abstractmethod
    def compressed_nbytes(self, size: CacheSize, prompt: int, *, tokens: int = 0, joinable: bool = False) -> int:
        """Exact bytes of a layer after `compress` of prompts of `prompt` tokens and `tokens` generated ones, where all
        prompts are equally long and all layers have equal budgets. joinable: after `to_joinable` too."""


CACHES: Registry[Any] = Registry("cache policy")
