"""Mixing by ridge regression at every token: linear attention whose queries are solved against the keys so far."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention.base import DOCUMENTS, Traits
from attnzoo.attention.checks import check_state
from attnzoo.attention.edits.traits import Editing
from attnzoo.attention.parts.mixing import Mixing, refuse_cache
from attnzoo.attention.parts.position import QKV
from attnzoo.attention.parts.projection import Heads
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.ridge_queries import ridge_queries
from attnzoo.types import accumulation_dtype, dtype_bytes


@dataclass
class MesaState(State):
    """gram_BKHH, memory_BKHH: the running sums of k k^T and of k v^T."""

    gram_BKHH: Tensor
    memory_BKHH: Tensor


class MesaMixing(Mixing):
    """(sum_{s<=t} v_s k_s^T) (sum_{s<=t} k_s k_s^T + ridge I)^-1 q_t, with one learned ridge a kv head."""

    def __init__(self, heads: Heads, *, ridge: float) -> None:
        super().__init__()
        if ridge <= 0:
            raise ValueError(f"ridge={ridge} must be positive: without it the sum of the first keys has no inverse")
        self.heads, self.ridge = heads, ridge
        self.log_ridge = nn.Parameter(torch.empty(heads.num_kv_heads))
        self.reset_parameters(0.0)

    @property
    def traits(self) -> Traits:
        return Traits(masks=DOCUMENTS, growth="O(1)")

    @property
    def editing(self) -> Editing:
        return Editing(why_not="its outputs solve a regression over all keys, and no key has a weight of its own")

    def reset_parameters(self, std: float) -> None:
        nn.init.constant_(self.log_ridge, math.log(self.ridge))

    def _run(
        self,
        qkv: QKV,
        impl: Impl,
        state: MesaState | None = None,
        *,
        counts_B: Tensor | None = None,
        starts_BT: Tensor | None = None,
    ) -> tuple[Tensor, MesaState]:
        dtype = accumulation_dtype(qkv[0].dtype)
        q, k, v = (x.transpose(1, 2).to(dtype) for x in qkv)
        gram, memory = (None, None) if state is None else (x.to(dtype) for x in (state.gram_BKHH, state.memory_BKHH))
        # Solves are torch's on every device: there is no kernel to ask for. A name that nothing has is refused below.
        solving: Impl = "reference" if impl == "reference" else "torch"
        ridge_K = self.log_ridge.to(dtype).exp()
        solved, gram = ridge_queries(
            q, k, ridge_K, gram_BKHH=gram, counts_B=counts_B, starts_BT=starts_BT, impl=solving
        )
        out, memory = linear_attention(
            solved, k, v, memory_BKHH=memory, counts_B=counts_B, starts_BT=starts_BT, impl=impl
        )
        return out.to(qkv[0].dtype), MesaState(gram, memory)

    def forward(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        return self._run(qkv, impl, starts_BT=mask.starts_BT)[0]

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
        cache: CachePolicy | None = None,
    ) -> MesaState:
        refuse_cache(cache, "the mesa layer")
        shape = (batch, self.heads.num_kv_heads, self.heads.head_dim, self.heads.head_dim)
        gram, memory = (new_zeros(*shape, device=device, dtype=accumulation_dtype(dtype)) for _ in range(2))
        return MesaState(gram, memory)

    def check_state(self, name: str, state: Any) -> None:
        sums = (None, self.heads.num_kv_heads, self.heads.head_dim, self.heads.head_dim)
        check_state(name, state, MesaState, {"gram_BKHH": sums, "memory_BKHH": sums})

    def extend(self, qkv: QKV, state: Any, step: StepInputs, impl: Impl) -> tuple[Tensor, MesaState]:
        out, after = self._run(qkv, impl, state, counts_B=step.counts_B)
        return out, after.map(lambda _, x: x.to(state.gram_BKHH.dtype))

    def state_bytes(self, batch: int, capacity: int, dtype: torch.dtype) -> int:
        entries = 2 * self.heads.num_kv_heads * self.heads.head_dim**2
        return batch * entries * dtype_bytes(accumulation_dtype(dtype))

    def flops(self, batch: int, tokens: int, context: int) -> int:
        """The recurrent form: two outer products, a Cholesky factorisation (H^3 / 3) a kv head; two triangular solves
        and a read a query head."""
        head_dim = self.heads.head_dim
        per_kv_head = 4 * head_dim**2 + head_dim**3 // 3
        return batch * tokens * (self.heads.num_kv_heads * per_kv_head + self.heads.num_heads * 4 * head_dim**2)
