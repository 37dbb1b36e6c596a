"""Where order comes from: nothing, rotation, or relative terms in the scores.

A position encodes q and k before the cache (`encode`) and attends with logical positions (`attend`), so the
same code serves the parallel form, streaming, and caches that have dropped tokens.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.parts.projection import Heads
from attnzoo.ops.impl import Impl
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.rope import rope
from attnzoo.ops.sdpa import sdpa
from attnzoo.ops.sinusoid_sdpa import sinusoid_sdpa

PositionKind = Literal["none", "rope", "table", "sinusoid"]


class Position(nn.Module, ABC):
    """Base of positions. `kind` is the name used by `Traits.position`."""

    kind: ClassVar[PositionKind]

    def encode(self, q_BTNH: Tensor, k_BTKH: Tensor, positions_BT: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
        """q and k as they enter the scores and the cache."""
        return q_BTNH, k_BTKH

    @abstractmethod
    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        query_positions_BT: Tensor | None,
        key_positions_BKS: Tensor | None,
        impl: Impl,
    ) -> Tensor:
        """o_BNTH from (q_BNTH, k_BKSH, v_BKSH); positions None means the parallel form."""

    def reset_parameters(self, std: float) -> None:
        """Initialises the position's parameters."""

    def flops(self, batch: int, tokens: int, context: int) -> int:
        """FLOPs beyond q.k and the weighted sum of values."""
        return 0


class NoPosition(Position):
    """Scores know no order beyond causality."""

    kind: ClassVar[PositionKind] = "none"

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        query_positions_BT: Tensor | None,
        key_positions_BKS: Tensor | None,
        impl: Impl,
    ) -> Tensor:
        return sdpa(*qkv, query_positions_BT=query_positions_BT, key_positions_BKS=key_positions_BKS, impl=impl)


class Rope(NoPosition):
    """Rotary positions: k is cached after rotation."""

    kind = "rope"

    def __init__(self, heads: Heads, theta: float) -> None:
        super().__init__()
        if heads.head_dim % 2:
            raise ValueError(
                f"head_dim={heads.head_dim} is odd; rotary positions turn pairs of channels: change num_heads or "
                "set an even head_dim"
            )
        if theta <= 0:
            raise ValueError(f"rope_theta={theta} must be positive; 10000.0 is usual")
        self.theta = theta

    def encode(self, q_BTNH: Tensor, k_BTKH: Tensor, positions_BT: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
        return (
            rope(q_BTNH, positions_BT, theta=self.theta, impl=impl),
            rope(k_BTKH, positions_BT, theta=self.theta, impl=impl),
        )


class RelativeTable(Position):
    """(q_i + u) . k_j + q_i . R[i-j] + S[i-j] with free tables R, S and u, all zero at first.

    A table for distance d has row min(d, max_distance - 1).
    """

    kind = "table"

    def __init__(self, heads: Heads, max_distance: int) -> None:
        super().__init__()
        if max_distance < 1:
            raise ValueError(f"max_distance={max_distance}: the table needs at least one row")
        self.heads = heads
        self.content_bias = nn.Parameter(torch.zeros(heads.num_heads, heads.head_dim))
        self.table = nn.Parameter(torch.zeros(heads.num_heads, max_distance, heads.head_dim))
        self.table_bias = nn.Parameter(torch.zeros(heads.num_heads, max_distance))

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        query_positions_BT: Tensor | None,
        key_positions_BKS: Tensor | None,
        impl: Impl,
    ) -> Tensor:
        return relative_sdpa(
            *qkv,
            content_bias_NH=self.content_bias,
            table_NPH=self.table,
            table_bias_NP=self.table_bias,
            query_positions_BT=query_positions_BT,
            key_positions_BKS=key_positions_BKS,
            impl=impl,
        )

    def reset_parameters(self, std: float) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def flops(self, batch: int, tokens: int, context: int) -> int:
        rows = min(context, self.table_bias.shape[1])
        return 2 * batch * tokens * rows * self.heads.num_heads * self.heads.head_dim


class RelativeSinusoid(Position):
    """Transformer-XL's own form: sinusoids of i-j through W_R, with learned u and v (zero at first)."""

    kind = "sinusoid"

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        if heads.model_dim % 2:
            raise ValueError(f"model_dim={heads.model_dim} is odd; sinusoids come in pairs of sine and cosine")
        self.heads = heads
        self.content_bias = nn.Parameter(torch.zeros(heads.num_heads, heads.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(heads.num_heads, heads.head_dim))
        self.weight = nn.Parameter(torch.zeros(heads.num_heads, heads.head_dim, heads.model_dim))
        self.reset_parameters(0.02)

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        query_positions_BT: Tensor | None,
        key_positions_BKS: Tensor | None,
        impl: Impl,
    ) -> Tensor:
        return sinusoid_sdpa(
            *qkv,
            content_bias_NH=self.content_bias,
            position_bias_NH=self.position_bias,
            weight_NHD=self.weight,
            query_positions_BT=query_positions_BT,
            key_positions_BKS=key_positions_BKS,
            impl=impl,
        )

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.content_bias)
        nn.init.zeros_(self.position_bias)
        nn.init.normal_(self.weight, std=std)

    def flops(self, batch: int, tokens: int, context: int) -> int:
        width = self.heads.model_dim
        return 2 * batch * tokens * self.heads.num_heads * width * (self.heads.head_dim + context)
