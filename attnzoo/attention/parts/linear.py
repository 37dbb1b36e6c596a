"""Mixing without a softmax: a running sum of outer products of keys and values, read by each query."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import DOCUMENTS, Traits
from attnzoo.attention.checks import check_state
from attnzoo.attention.edits.items import Here
from attnzoo.attention.edits.order import Weighed, changed
from attnzoo.attention.edits.run import LayerPlan
from attnzoo.attention.edits.streamed import parallel_call
from attnzoo.attention.edits.traits import Editing
from attnzoo.attention.parts.mixing import ContextState, Mixing, refuse_cache
from attnzoo.attention.parts.position import QKV
from attnzoo.attention.parts.projection import Heads
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.linear_attention.full import full_linear_attention, normalised, read, summed
from attnzoo.types import accumulation_dtype, dtype_bytes

LINEAR_EDITING = Editing(
    softmax=False,
    weights=True,
    reads=True,
    streams=False,
    why_not="it has no softmax and no scores, and its state holds a sum in place of keys",
)

FeatureMap = Literal["elu1", "relu", "identity"]


@dataclass
class LinearState(State):
    """memory_BKHH: the running sum of k v^T, with the normaliser as last column if there is one."""

    memory_BKHH: Tensor


@dataclass
class LinearContext(ContextState):
    """context_BKHH: as memory_BKHH of `LinearState`, of all tokens of a context. It has a name of its own, so that
    neither is joined or loaded as the other."""

    context_BKHH: Tensor


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
        if self.decay_logit is not None:  # a token that comes after the query cannot have been forgotten
            return Traits(masks=DOCUMENTS, position="recurrence", growth="O(1)")
        return Traits(masks=DOCUMENTS | {"full", "keys"}, context=True, growth="O(1)")

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

    def forward(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        if mask.causal:
            if mask.keys_BS is not None:
                return self._of_keys(qkv, mask, impl)
            return self._run(qkv, impl, starts_BT=mask.starts_BT)[0]
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return full_linear_attention(
            self._features(q), self._features(k), v, keys_BS=mask.keys_BS, normalise=self.normalise, impl=impl
        )

    def _of_keys(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        """Causal, over the keys that exist: the normaliser is kept as one more value, because it is zero for a query
        that sees none."""
        assert mask.keys_BS is not None
        gaps = ~mask.keys_BS[:, None, :, None]
        q, k, v = (x.transpose(1, 2) for x in qkv)
        k, v = self._features(k).masked_fill(gaps, 0.0), v.masked_fill(gaps, 0.0)
        if self.normalise:
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        sums, _ = linear_attention(self._features(q), k, v, starts_BT=mask.starts_BT, impl=impl)
        return normalised(sums) if self.normalise else sums

    @property
    def editing(self) -> Editing:
        return replace(LINEAR_EDITING, bounded=self.normalise)

    def edited(self, out_BNTH: Tensor | None, qkv: QKV, mask: Mask, impl: Impl, edits: LayerPlan) -> Tensor:
        """By the weights that the sums imply: gamma^(t-s) phi(q_t) . phi(k_s), over their sum where normalised."""
        q, k, v = (x.transpose(1, 2) for x in qkv)
        features = (self._features(q), self._features(k), v)
        call = parallel_call(features, mask, lambda q_BNTH, _mask: (q_BNTH, None))
        return edits.apply(replace(call, weigh=self._weigh), out_BNTH)

    def _weigh(
        self, products_NRS: Tensor, visible_NRS: Tensor, where: tuple[Tensor, Tensor], items: list[tuple[Any, Here]]
    ) -> Weighed:
        hidden_NRS = ~visible_NRS
        weights = products_NRS.masked_fill(hidden_NRS, 0.0)
        if self.decay_logit is not None and items:
            heads_N = items[0][1].heads_N
            assert heads_N is not None
            kv_N = heads_N // (self.heads.num_heads // self.heads.num_kv_heads)
            decay_N = torch.sigmoid(self.decay_logit.to(weights.dtype))[kv_N]
            distance_NRS = (where[0][:, None] - where[1][:, None]).clamp(min=0)
            weights = weights * decay_N[:, None, None] ** distance_NRS
        if self.normalise:
            weights = normalised(torch.cat([weights, weights.sum(-1, keepdim=True)], dim=-1))
        named = [(meant.item, here) for meant, here in items]
        empty_NR1 = hidden_NRS.all(-1, keepdim=True).expand(*weights.shape[:2], 1)
        return Weighed(weights, changed(weights, hidden_NRS, named), empty_NR1)

    def init_context(self, qkv: QKV, keys_BS: Tensor | None, impl: Impl) -> LinearContext:
        _, k, v = (x.transpose(1, 2) for x in qkv)
        return LinearContext(summed(self._features(k), v, keys_BS, self.normalise))

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

    def check_state(self, name: str, state: Any) -> None:
        head_dim = self.heads.head_dim
        sums = (None, self.heads.num_kv_heads, head_dim, head_dim + int(self.normalise))
        what = "context_BKHH" if isinstance(state, LinearContext) else "memory_BKHH"
        check_state(name, state, (LinearState, LinearContext), {what: sums})

    def extend(self, qkv: QKV, state: Any, step: StepInputs, impl: Impl) -> tuple[Tensor, State]:
        if isinstance(state, LinearContext):
            return read(self._features(qkv[0].transpose(1, 2)), state.context_BKHH, self.normalise), state
        memory_BKHH = state.memory_BKHH.to(accumulation_dtype(qkv[0].dtype))
        o_BNTH, memory = self._run(qkv, impl, memory_BKHH=memory_BKHH, counts_B=step.counts_B)
        return o_BNTH, LinearState(memory.to(state.memory_BKHH.dtype))

    def state_bytes(self, batch: int, capacity: int, dtype: torch.dtype) -> int:
        entries = self.heads.head_dim * (self.heads.head_dim + int(self.normalise))
        return batch * self.heads.num_kv_heads * entries * dtype_bytes(accumulation_dtype(dtype))

    def flops(self, batch: int, tokens: int, context: int) -> int:
        """The recurrent form: update and read one [H, H] matrix a head and token."""
        width = self.heads.head_dim + int(self.normalise)
        heads = self.heads.num_heads + self.heads.num_kv_heads
        return 2 * batch * tokens * heads * self.heads.head_dim * width
