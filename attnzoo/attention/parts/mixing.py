"""How tokens read others: the base of mixings, and a softmax over keys."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Growth, Traits
from attnzoo.attention.checks import check_state
from attnzoo.attention.edits.run import LayerPlan
from attnzoo.attention.edits.streamed import StreamedEdits, parallel_call
from attnzoo.attention.edits.traits import NO_EDITING, SOFTMAX_EDITING, Editing
from attnzoo.attention.parts.position import QKV, Position, visible_pairs
from attnzoo.attention.parts.projection import Heads
from attnzoo.kvcache import CachePolicy, CacheState, CacheView, FullCache, KVLayer, WindowCache
from attnzoo.kvcache.base import Need, NewTokens
from attnzoo.kvcache.full import compressing
from attnzoo.kvcache.state import State
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask, MaskField
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.common.tables import Tables


class ContextState(State):
    """Base of states that hold a context, which all queries to come read and none adds to."""


class Mixing(nn.Module, ABC):
    """Base of mixings: o_BNTH from q_BTNH, and k_BSKH, v_BSKH of the same tokens or of a context."""

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What a variant with this mixing promises."""

    @property
    def implementations(self) -> Sequence[str]:
        """What `impl` may be besides "auto"."""
        return ("reference", "torch", "triton")

    @abstractmethod
    def forward(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        """The parallel form, under a mask that the traits name."""

    def kv_layers(self) -> tuple[KVLayer, ...]:
        """Where this mixing keeps keys and values, by default nowhere."""
        return ()

    @property
    def editing(self) -> Editing:
        """What of this mixing can be read and edited."""
        return NO_EDITING

    def edited(self, out_BNTH: Tensor | None, qkv: QKV, mask: Mask, impl: Impl, edits: LayerPlan) -> Tensor:
        """The parallel form with edits. out_BNTH: without them, None where the edits replace all of it."""
        raise NotImplementedError(f"{type(self).__name__} says what can be edited, and has no `edited`")

    def extend_edited(
        self,
        qkv: QKV,
        state: Any,
        step: StepInputs,
        impl: Impl,
        edits: LayerPlan,
    ) -> tuple[Tensor, State]:
        """`extend` with edits."""
        raise NotImplementedError(f"{type(self).__name__} says that edits stream, and has no `extend_edited`")

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
    def extend(self, qkv: QKV, state: Any, step: StepInputs, impl: Impl) -> tuple[Tensor, State]:
        """The streaming form: (o_BNTH, new state)."""

    def check_state(self, name: str, state: Any) -> None:
        """Raises ValueError for a state that this mixing has not made, by kind or sizes. name: of the layer."""

    def init_context(self, qkv: QKV, keys_BS: Tensor | None, impl: Impl) -> ContextState:
        """The state that holds a context, of which `keys_BS` exist (None: all); there are no queries yet."""
        raise ValueError(f"{type(self).__name__} reads its own sequence alone (trait context=False)")

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


@dataclass
class SoftmaxContext(ContextState):
    """Keys and values of a context, [B, K, S, H], and which of them exist."""

    keys_BKSH: Tensor
    values_BKSH: Tensor
    exists_BS: Tensor

    def positions(self) -> Tensor:
        """positions_B1S: where the keys stand, -1 for those that do not exist."""
        keys_S = torch.arange(self.exists_BS.shape[1], device=self.exists_BS.device)
        return torch.where(self.exists_BS, keys_S, -1)[:, None]


class SoftmaxMixing(Mixing):
    """Softmax attention with a position, over what the mask shows: by default all of the past, or a window and the
    first tokens (`sinks`).

    A position without terms for keys after the query takes masks that show none; a window is causal.
    """

    def __init__(self, heads: Heads, position: Position, *, window: int | None = None, sinks: int = 0) -> None:
        super().__init__()
        self.heads, self.position = heads, position
        self.mask = Mask(window=window, sinks=sinks)
        self.cache: FullCache | WindowCache = FullCache() if window is None else WindowCache(window, sinks)

    @property
    def traits(self) -> Traits:
        growth: Growth = "O(T)" if self.mask.window is None else "O(window)"
        masks: set[MaskField] = {"causal", "starts", "keys", "pairs"}
        if self.position.ahead:
            masks.add("prefix")
        full = self.position.ahead and self.mask.window is None
        if full:
            masks.add("full")
        return Traits(
            masks=frozenset(masks),
            context=full,
            position=self.position.kind,
            growth=growth,
            shift_invariant=self.position.shift_invariant,
        )

    @property
    def implementations(self) -> Sequence[str]:
        return self.position.implementations

    def forward(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        tokens, device = qkv[0].shape[1], qkv[0].device
        q, k = self._encode(qkv, _parallel(tokens, device), impl)
        return self.position.attend((q, k, qkv[2].transpose(1, 2)), self._own(mask), impl)

    @cached_property
    def editing(self) -> Editing:
        if "terms" in self.position.says:
            return SOFTMAX_EDITING
        return Editing(why_not=f"{type(self.position).__name__} does not say its scores (`terms`)")

    def edited(self, out_BNTH: Tensor | None, qkv: QKV, mask: Mask, impl: Impl, edits: LayerPlan) -> Tensor:
        mask = self._own(mask)
        q, k = self._encode(qkv, _parallel(qkv[0].shape[1], qkv[0].device), impl)
        call = parallel_call((q, k, qkv[2].transpose(1, 2)), mask, self.position.terms)
        return edits.apply(call, out_BNTH)

    def _own(self, mask: Mask) -> Mask:
        """The mask with the layer's window, which is causal."""
        return replace(mask, window=self.mask.window, sinks=self.mask.sinks) if mask.causal else mask

    def _encode(self, qkv: QKV, step: StepInputs, impl: Impl) -> tuple[Tensor, Tensor]:
        """(q_BNTH, k_BKSH) as they enter the scores; tokens of a context stand at 0..S-1."""
        q, k, _ = qkv
        if k.shape[1] == q.shape[1]:
            q, k = self.position.encode(q, k, step, impl)
        else:
            q, _ = self.position.encode(q, q[:, :, :0], step, impl)
            _, k = self.position.encode(k[:, :, :0], k, _parallel(k.shape[1], k.device), impl)
        return q.transpose(1, 2), k.transpose(1, 2)

    def init_context(self, qkv: QKV, keys_BS: Tensor | None, impl: Impl) -> SoftmaxContext:
        _, k_BKSH = self._encode(qkv, _parallel(0, qkv[0].device), impl)
        if keys_BS is None:
            keys_BS = torch.ones(k_BKSH.shape[0], k_BKSH.shape[2], dtype=torch.bool, device=k_BKSH.device)
        keys_BS = keys_BS.clone()  # a caller may fill the same buffer for the next batch
        return SoftmaxContext(k_BKSH.contiguous(), qkv[2].transpose(1, 2).contiguous(), keys_BS)

    def _read(
        self, q: Tensor, context: SoftmaxContext, step: StepInputs, score_function: "SoftmaxScoreFunction"
    ) -> Tensor:
        q, _ = self.position.encode(q, q[:, :, :0], step, score_function.impl)
        view = CacheView(context.keys_BKSH, context.values_BKSH, context.positions())

        def attend(q_BNTH: Tensor, view: CacheView, positions_BT: Tensor) -> Tensor:
            mask = Mask(causal=False, query_positions_BT=positions_BT, key_positions_BKS=view.positions_BKS)
            return self.position.attend(_in_dtype(q_BNTH, view), mask, score_function.impl)

        if score_function.edits is not None:
            return score_function.edits.over(q.transpose(1, 2), view, step.positions_BT, attend)
        return attend(q.transpose(1, 2), view, step.positions_BT)

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        cache: CachePolicy | None = None,
    ) -> State:
        policy = compressing(cache)
        if policy is not None:
            if self.mask.window is not None:
                raise ValueError(
                    f"cache: attention with window={self.mask.window} keeps a constant number of tokens already; leave "
                    "the cache or the window out"
                )
            self.position.check_says(policy.needs, policy.describe())
            learned = next(self.position.parameters(), None)
            if learned is not None and learned.dtype != dtype:
                raise ValueError(
                    f"dtype={dtype}: {policy.describe()} of a layer with learned positions is kept in the dtype of its "
                    f"weights, {learned.dtype}; leave dtype or the cache out"
                )
        return (policy or self.cache).init(self._kv.size(batch, dtype, device), capacity)

    @cached_property
    def _kv(self) -> KVLayer:
        heads = self.heads
        return KVLayer(heads.num_heads, heads.num_kv_heads, heads.head_dim, self.cache, self.score_function)

    def kv_layers(self) -> tuple[KVLayer, ...]:
        return (self._kv,)

    def check_state(self, name: str, state: Any) -> None:
        sizes = (self.heads.num_kv_heads, self.heads.head_dim)
        if isinstance(state, SoftmaxContext) and self.mask.window is None:
            check_state(name, state, SoftmaxContext, {"keys_BKSH": (None, sizes[0], None, sizes[1])})
            return
        check_state(name, state, CacheState, {})
        if state.heads != sizes:
            raise ValueError(
                f"{name} got the state of another layer: it has (kv heads, head_dim) = {state.heads}, and this layer "
                f"{sizes}; begin with this layer's init_state"
            )
        if not state.policy.exact and isinstance(self.cache, FullCache):
            return
        own, found = self.cache.describe(), state.policy.describe()
        if found != own:
            raise ValueError(
                f"{name} got the state of another layer, a cache of {found}, and this layer's is {own}; begin with "
                "this layer's init_state"
            )

    def score_function(self, impl: Impl, edits: StreamedEdits | None = None) -> "SoftmaxScoreFunction":
        """The scores, as a compressing cache reads them."""
        return SoftmaxScoreFunction(self.position, self.mask, impl, edits)

    def extend(self, qkv: QKV, state: Any, step: StepInputs, impl: Impl) -> tuple[Tensor, State]:
        return self._extend(qkv, state, step, self.score_function(impl))

    def extend_edited(
        self,
        qkv: QKV,
        state: Any,
        step: StepInputs,
        impl: Impl,
        edits: LayerPlan,
    ) -> tuple[Tensor, State]:
        mask = Mask.full() if isinstance(state, SoftmaxContext) else self.mask
        uncounted = isinstance(state, CacheState) and state.policy.merges_uncounted
        streamed = StreamedEdits(edits, edits.placed(step), mask, self.position.terms, uncounted)
        return self._extend(qkv, state, step, self.score_function(impl, streamed))

    def _extend(
        self,
        qkv: QKV,
        state: Any,
        step: StepInputs,
        score_function: "SoftmaxScoreFunction",
    ) -> tuple[Tensor, State]:
        q, k, v = qkv
        if isinstance(state, SoftmaxContext):
            return self._read(q, state, step, score_function), state
        q, k = self.position.encode(q, k, step, score_function.impl)
        new = NewTokens(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), step)
        out, after = state.policy.attend(state, score_function, new)
        return out, after

    def state_bytes(self, batch: int, capacity: int, dtype: torch.dtype) -> int:
        return self.cache.nbytes(self._kv.size(batch, dtype), capacity)

    def flops(self, batch: int, tokens: int, context: int) -> int:
        pairs = visible_pairs(tokens, context, self.mask)
        scores_and_sums = 4 * batch * pairs * self.heads.num_heads * self.heads.head_dim
        return scores_and_sums + self.position.flops(batch, tokens, context, self.mask)

    def unread(self, context: int) -> int:
        return self.position.unread(context)

    def reset_parameters(self, std: float) -> None:
        self.position.reset_parameters(std)


def _parallel(tokens: int, device: torch.device) -> StepInputs:
    """Tokens of the parallel form, one row for all."""
    return StepInputs(torch.arange(tokens, device=device)[None])


def refuse_cache(cache: CachePolicy | None, name: str) -> None:
    """Raises ValueError where a cache is asked for and there are no keys to keep."""
    if cache is not None:
        raise ValueError(f"cache: {name} keeps a state of constant size and no keys to compress; use cache=None")


def _in_dtype(q_BNTH: Tensor, view: CacheView) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) in the dtype of the queries: a cache may keep fewer digits than the weights have."""
    return q_BNTH, view.keys_BKSH.to(q_BNTH.dtype), view.values_BKSH.to(q_BNTH.dtype)


@dataclass(frozen=True)
class SoftmaxScoreFunction:
    """`attnzoo.kvcache.ScoreFunction` of softmax attention with a position."""

    position: Position
    mask: Mask
    impl: Impl
    edits: StreamedEdits | None = None

    @property
    def relative(self) -> bool:
        return self.position.relative

    def attend(self, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor) -> Tensor:
        heads_first = _in_dtype(q_BNTH, view)
        if view.alone:  # a whole prompt: the parallel form computes no pair that causality hides
            return self.position.attend(heads_first, self.mask, self.impl)
        return self.position.attend(heads_first, view.shown(self.mask, positions_BT), self.impl)

    @property
    def says(self) -> frozenset[Need]:
        return self.position.says

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        return self.position.terms(q_BNTH, mask)

    def tables(self, mask: Mask, tokens: int) -> Tables | PairBias | None:
        return self.position.tables(mask, tokens)
