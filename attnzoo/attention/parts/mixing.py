"""How tokens read the past: a softmax over cached keys, or a running sum of outer products."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Growth, Traits
from attnzoo.attention.parts.position import QKV, Position, visible_pairs
from attnzoo.attention.parts.projection import Heads
from attnzoo.kvcache import CachePolicy, CacheView, ExactCache, FullCache, WindowCache
from attnzoo.kvcache.base import Need
from attnzoo.kvcache.compressed import CompressedState
from attnzoo.kvcache.keep_all import KeepAll
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.types import accumulation_dtype, dtype_bytes


class Mixing(nn.Module, ABC):
    """Base of mixings: o_BNTH from q_BTNH, k_BTKH, v_BTKH."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What a variant with this mixing promises."""

    @abstractmethod
    def forward(self, qkv: QKV, starts_BT: Tensor | None, impl: Impl) -> Tensor:
        """The parallel form; `starts_BT` as in `Mask`, None: every row is one sequence."""

    @abstractmethod
    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        cache: CachePolicy | None = None,
    ) -> State:
        """The empty state; `cache`: how keys and values are kept, None: exactly. Raises ValueError where there are
        none."""

    @abstractmethod
    def extend(
        self, qkv: QKV, state: Any, positions_BT: Tensor, counts_B: Tensor | None, impl: Impl
    ) -> tuple[Tensor, State]:
        """The streaming form: (o_BNTH, new state)."""

    @abstractmethod
    def state_bytes(self, batch: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes that `init_state` allocates."""

    @abstractmethod
    def flops(self, batch: int, tokens: int, context: int) -> int:
        """FLOPs over the pairs that causality leaves."""

    def unread(self, context: int) -> int:
        """Number of parameters that a context of this length does not read."""
        return 0

    def reset_parameters(self, std: float) -> None:
        """Initialises the mixing's parameters."""


class SoftmaxMixing(Mixing):
    """Softmax attention with a position, over all of the past or over a window and the first tokens (`sinks`)."""

    def __init__(self, heads: Heads, position: Position, *, window: int | None = None, sinks: int = 0) -> None:
        super().__init__()
        self.heads, self.position = heads, position
        self.mask = Mask(window=window, sinks=sinks)
        self.cache: ExactCache = FullCache() if window is None else WindowCache(window, sinks)

    @property
    def traits(self) -> Traits:
        growth: Growth = "O(T)" if self.mask.window is None else "O(window)"
        return Traits(position=self.position.kind, growth=growth, varlen=True)

    def forward(self, qkv: QKV, starts_BT: Tensor | None, impl: Impl) -> Tensor:
        q, k, v = qkv
        positions_1T = torch.arange(q.shape[1], device=q.device)[None]
        q, k = self.position.encode(q, k, positions_1T, impl)
        heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.position.attend(heads_first, replace(self.mask, starts_BT=starts_BT), impl)

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        cache: CachePolicy | None = None,
    ) -> State:
        policy: ExactCache | CachePolicy = self.cache
        if cache is not None and not isinstance(cache, KeepAll):
            if self.mask.window is not None:
                raise ValueError(
                    f"cache: attention with window={self.mask.window} keeps a constant number of tokens already; leave "
                    "the cache or the window out"
                )
            self.position.check_says(cache.needs, cache.describe())
            policy = cache
        return policy.init(batch, self.heads.num_kv_heads, self.heads.head_dim, capacity, device=device, dtype=dtype)

    def score_function(self, impl: Impl) -> "SoftmaxScoreFunction":
        """The scores, as a compressing cache reads them."""
        return SoftmaxScoreFunction(self.position, self.mask, impl)

    def extend(
        self, qkv: QKV, state: Any, positions_BT: Tensor, counts_B: Tensor | None, impl: Impl
    ) -> tuple[Tensor, State]:
        q, k, v = qkv
        q, k = self.position.encode(q, k, positions_BT, impl)
        if isinstance(state, CompressedState):
            heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            out: tuple[Tensor, State] = state.policy.attend(
                state, self.score_function(impl), heads_first, positions_BT, counts_B
            )
            return out
        state, view = self.cache.append(state, k.transpose(1, 2), v.transpose(1, 2), positions_BT, counts_B)
        return self.score_function(impl).attend(q.transpose(1, 2), view, positions_BT), state

    def state_bytes(self, batch: int, capacity: int, dtype: torch.dtype) -> int:
        return self.cache.nbytes(batch, self.heads.num_kv_heads, self.heads.head_dim, capacity, dtype)

    def flops(self, batch: int, tokens: int, context: int) -> int:
        pairs = visible_pairs(tokens, context, self.mask)
        scores_and_sums = 4 * batch * pairs * self.heads.num_heads * self.heads.head_dim
        return scores_and_sums + self.position.flops(batch, tokens, context, self.mask)

    def unread(self, context: int) -> int:
        return self.position.unread(context)

    def reset_parameters(self, std: float) -> None:
        self.position.reset_parameters(std)


def refuse_cache(cache: CachePolicy | None, name: str) -> None:
    """Raises ValueError where a cache is asked for and there are no keys to keep."""
    if cache is not None:
        raise ValueError(f"cache: {name} keeps a state of constant size and no keys to compress; use cache=None")


@dataclass(frozen=True)
class SoftmaxScoreFunction:
    """`attnzoo.kvcache.Reader` of softmax attention with a position."""

    position: Position
    mask: Mask
    impl: Impl

    @property
    def relative(self) -> bool:
        return self.position.relative

    def attend(self, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor) -> Tensor:
        heads_first = (q_BNTH, view.keys_BKSH, view.values_BKSH)
        if view.alone:  # a whole prompt: the parallel form computes no pair that causality hides
            return self.position.attend(heads_first, self.mask, self.impl)
        mask = Mask(
            window=self.mask.window,
            sinks=self.mask.sinks,
            query_positions_BT=positions_BT,
            key_positions_BKS=view.positions_BKS,
        )
        return self.position.attend(heads_first, mask, self.impl)

    @property
    def says(self) -> frozenset[Need]:
        return self.position.says

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        return self.position.terms(q_BNTH, mask)

    def tables(self, mask: Mask, tokens: int) -> Tables | None:
        return self.position.tables(mask, tokens)


FeatureMap = Literal["elu1", "relu", "identity"]


@dataclass
class LinearState(State):
    """memory_BKHH: the running sum of k v^T, with the normaliser as last column if there is one."""

    memory_BKHH: Tensor


class LinearMixing(Mixing):
    """Linear attention: phi(q_t) . sum_{s<=t} phi(k_s) v_s^T, optionally normalised and decayed.

    With `decay`, each kv head forgets at a learned rate sigmoid(decay_logit), at first 1 - 2^(-5-head) as in
    RetNet (arXiv 2307.08621, eq. 8).
    """

    def __init__(self, heads: Heads, *, feature_map: FeatureMap, normalise: bool, decay: bool) -> None:
        super().__init__()
        if normalise and feature_map != "elu1":
            raise ValueError(
                f"normalise=True with feature_map={feature_map!r}: the normaliser can be zero or negative; "
                "use feature_map='elu1' or normalise=False"
            )
        self.heads, self.feature_map, self.normalise = heads, feature_map, normalise
        self.decay_logit = nn.Parameter(torch.empty(heads.num_kv_heads)) if decay else None
        self.reset_parameters(0.0)

    @property
    def traits(self) -> Traits:
        return Traits(position="none" if self.decay_logit is None else "recurrence", growth="O(1)", varlen=True)

    def reset_parameters(self, std: float) -> None:
        if self.decay_logit is not None:
            # On the CPU also for a model without storage: torch computes a range without storage by its compiler.
            head_K = torch.arange(self.heads.num_kv_heads, dtype=torch.float64, device="cpu")
            rate = 1.0 - 2.0 ** (-5.0 - head_K)
            with torch.no_grad():
                self.decay_logit.copy_(rate.logit())

    def _features(self, x: Tensor) -> Tensor:
        if self.feature_map == "elu1":
            return F.elu(x) + 1
        return F.relu(x) if self.feature_map == "relu" else x

    def _run(self, qkv: QKV, impl: Impl, **options: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        decay_K = None
        if self.decay_logit is not None:
            decay_K = torch.sigmoid(self.decay_logit.to(accumulation_dtype(q.dtype)))
        return linear_attention(
            self._features(q),
            self._features(k),
            v,
            decay_K=decay_K,
            normalise=self.normalise,
            impl=impl,
            **options,
        )

    def forward(self, qkv: QKV, starts_BT: Tensor | None, impl: Impl) -> Tensor:
        return self._run(qkv, impl, starts_BT=starts_BT)[0]

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        cache: CachePolicy | None = None,
    ) -> LinearState:
        refuse_cache(cache, "linear attention")
        head_dim = self.heads.head_dim
        shape = (batch, self.heads.num_kv_heads, head_dim, head_dim + int(self.normalise))
        return LinearState(new_zeros(*shape, device=device, dtype=accumulation_dtype(dtype)))

    def extend(
        self, qkv: QKV, state: Any, positions_BT: Tensor, counts_B: Tensor | None, impl: Impl
    ) -> tuple[Tensor, LinearState]:
        o_BNTH, memory = self._run(qkv, impl, memory_BKHH=state.memory_BKHH, counts_B=counts_B)
        return o_BNTH, LinearState(memory)

    def state_bytes(self, batch: int, capacity: int, dtype: torch.dtype) -> int:
        entries = self.heads.head_dim * (self.heads.head_dim + int(self.normalise))
        return batch * self.heads.num_kv_heads * entries * dtype_bytes(accumulation_dtype(dtype))

    def flops(self, batch: int, tokens: int, context: int) -> int:
        """The recurrent form: update and read one [H, H] matrix a head and token."""
        width = self.heads.head_dim + int(self.normalise)
        heads = self.heads.num_heads + self.heads.num_kv_heads
        return 2 * batch * tokens * heads * self.heads.head_dim * width
