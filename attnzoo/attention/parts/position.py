"""Where order comes from: nothing, rotation, or relative terms in the scores.

A position encodes q and k before the cache (`encode`) and attends under a mask of logical positions (`attend`), so
the same code serves the parallel form, streaming, and caches that have dropped tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.parts.projection import Heads
from attnzoo.kvcache.base import Need
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa import relative_sdpa
from attnzoo.ops.relative_sdpa.torch import streamed_bias
from attnzoo.ops.rope import RopeScaling, rope, rope_waves, turned
from attnzoo.ops.sdpa import sdpa
from attnzoo.ops.sinusoid_sdpa import sinusoid_sdpa
from attnzoo.ops.sinusoid_sdpa.torch import as_tables, streamed_waves
from attnzoo.ops.sinusoid_sdpa.waves import STRIDE

QKV = tuple[Tensor, Tensor, Tensor]
PositionKind = Literal["none", "rope", "table", "sinusoid", "bias"]


class Position(nn.Module, ABC):
    """Base of positions. `kind` is the name used by `Traits.position`."""

    kind: ClassVar[PositionKind]
    relative: ClassVar[bool] = True
    """Whether scores have terms besides the product with the key."""
    implementations: Sequence[str] = ("reference", "torch", "triton")
    """What `impl` may be besides "auto"."""
    shift_invariant: bool = True
    """Whether adding n to all positions changes nothing."""
    ahead: bool = True
    """Whether the scores of keys after the query are said, for masks that show such."""

    def encode(self, q_BTNH: Tensor, k_BTKH: Tensor, step: StepInputs, impl: Impl) -> tuple[Tensor, Tensor]:
        """q and k of the step's tokens as they enter the scores and the cache."""
        return q_BTNH, k_BTKH

    @abstractmethod
    def attend(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        """o_BNTH from (q_BNTH, k_BKSH, v_BKSH) over the keys that the mask leaves visible."""

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """(content_BNTH, bias_BNTS): the scores are content . k / sqrt(H) + bias, with positions as the mask has them.

        For caches whose keys have lost channels, which the terms of position know nothing of. Raises ValueError where a
        position has no such form.
        """
        raise self._unsaid("terms")

    def tables(self, mask: Mask, tokens: int) -> Tables | PairBias | None:
        """The relative terms as tables by distance or as a function of pairs, None without any. Raises ValueError as
        `terms`."""
        raise self._unsaid("tables")

    @property
    def says(self) -> frozenset[Need]:
        """Which of `terms` and `tables` this position has."""
        methods: tuple[Need, ...] = ("terms", "tables")
        return frozenset(name for name in methods if getattr(type(self), name) is not getattr(Position, name))

    def check_says(self, needs: frozenset[Need], cache: str) -> None:
        """Raises ValueError where a cache needs more of a position than this one has."""
        missing = sorted(needs - self.says)
        if missing:
            raise self._unsaid(" and ".join(missing), cache)

    def _unsaid(self, missing: str, cache: str = "this cache") -> ValueError:
        return ValueError(
            f"cache: {type(self).__name__} does not say its scores as content . key + bias, which {cache} needs: write "
            f"its `{missing}`, choose streaming or random_tokens, which need no scores, or use cache=None"
        )

    def reset_parameters(self, std: float) -> None:
        """Initialises the position's parameters."""

    def flops(self, batch: int, tokens: int, context: int, mask: Mask) -> int:
        """FLOPs beyond q.k and the weighted sum of values."""
        return 0

    def unread(self, context: int) -> int:
        """Number of parameters that a context of this length does not read."""
        return 0


class NoPosition(Position):
    """Scores know no order beyond causality."""

    kind: ClassVar[PositionKind] = "none"
    relative = False
    scale: float | None = None
    """What scores are multiplied by; None: 1/sqrt(H)."""

    def attend(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        return sdpa(*qkv, mask=mask, scale=self.scale, impl=impl)

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        return q_BNTH if self.scale is None else q_BNTH * (self.scale * q_BNTH.shape[-1] ** 0.5), None

    def tables(self, mask: Mask, tokens: int) -> Tables | None:
        return None


class Unscaled(NoPosition):
    """No position, and scores that are not divided by sqrt(H)."""

    scale = 1.0


class Rope(NoPosition):
    """Rotary positions: k is cached after rotation."""

    kind = "rope"

    def __init__(self, heads: Heads, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        if heads.head_dim % 2:
            raise ValueError(
                f"head_dim={heads.head_dim} is odd; rotary positions turn pairs of channels: change num_heads or "
                "set an even head_dim"
            )
        if not 0 < theta < math.inf:
            raise ValueError(f"rope_theta={theta} must be a positive number; 10000.0 is usual")
        self.theta, self.scaling, self.head_dim = theta, scaling, heads.head_dim

    def encode(self, q_BTNH: Tensor, k_BTKH: Tensor, step: StepInputs, impl: Impl) -> tuple[Tensor, Tensor]:
        how = self.theta, self.scaling
        if impl == "reference":
            q, k = rope(q_BTNH, k_BTKH, positions_BT=step.positions_BT, theta=how[0], scaling=how[1], impl=impl)
            return q, k
        # Elementwise, and torch's on every device: there is no kernel to ask for.
        waves = step.once(_waves, self.head_dim, *how, q_BTNH.dtype)
        return turned(q_BTNH, waves), turned(k_BTKH, waves)


def _waves(
    step: StepInputs, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return rope_waves(step.positions_BT, head_dim, theta, scaling, dtype)


class RelativeTable(Position):
    """(q_i + u) . k_j + q_i . R[i-j] + S[i-j] with free tables R, S and u, all zero at first.

    A table has rows for the distances -max_ahead..max_distance-1, and farther ones have the first or last row. Without
    rows for keys after the query (`max_ahead` 0) masks that show such are refused.
    """

    kind = "table"

    def __init__(self, heads: Heads, max_distance: int, max_ahead: int = 0) -> None:
        super().__init__()
        if max_distance < 1:
            raise ValueError(f"max_distance={max_distance}: the table needs at least one row")
        if max_ahead < 0:
            raise ValueError(f"max_ahead={max_ahead} must be at least 0, the number of rows for keys after the query")
        self.heads, self.max_ahead, self.ahead = heads, max_ahead, max_ahead > 0
        rows = max_ahead + max_distance
        self.content_bias = nn.Parameter(torch.zeros(heads.num_heads, heads.head_dim))
        self.table = nn.Parameter(torch.zeros(heads.num_heads, rows, heads.head_dim))
        self.table_bias = nn.Parameter(torch.zeros(heads.num_heads, rows))

    def attend(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        return relative_sdpa(
            *qkv,
            content_bias_NH=self.content_bias,
            table_NPH=self.table,
            table_bias_NP=self.table_bias,
            future_rows=self.max_ahead,
            mask=mask,
            impl=impl,
        )

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        tokens, head_dim = q_BNTH.shape[2:]
        positions = mask.positions(tokens, tokens, q_BNTH.device)
        tables = Tables(self.content_bias, self.table, self.table_bias, self.max_ahead)
        return q_BNTH + self.content_bias[:, None], streamed_bias(q_BNTH, tables, positions, head_dim**-0.5)

    def tables(self, mask: Mask, tokens: int) -> Tables | None:
        return Tables(self.content_bias, self.table, self.table_bias, self.max_ahead)

    def reset_parameters(self, std: float) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def flops(self, batch: int, tokens: int, context: int, mask: Mask) -> int:
        """Queries meet a row of the table for every pair in the parallel form, and every row that they may need, once,
        in streaming."""
        products = table_products(tokens, context, mask, self.table_bias.shape[1] - self.max_ahead)
        return 2 * batch * products * self.heads.num_heads * self.heads.head_dim

    def unread(self, context: int) -> int:
        rows = self.max_ahead + max(self.table_bias.shape[1] - self.max_ahead - context, 0)
        return rows * self.heads.num_heads * (self.heads.head_dim + 1)


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

    def attend(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        return sinusoid_sdpa(
            *qkv,
            content_bias_NH=self.content_bias,
            position_bias_NH=self.position_bias,
            weight_NHD=self.weight,
            mask=mask,
            impl=impl,
        )

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        scale = q_BNTH.shape[-1] ** -0.5
        bias_BNTS = streamed_waves(q_BNTH + self.position_bias[:, None], self.weight * scale, mask)
        return q_BNTH + self.content_bias[:, None], bias_BNTS

    def tables(self, mask: Mask, tokens: int) -> Tables | None:
        return as_tables(self.content_bias, self.position_bias, self.weight, mask.reach(tokens, tokens))

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.content_bias)
        nn.init.zeros_(self.position_bias)
        nn.init.normal_(self.weight, std=std)

    def flops(self, batch: int, tokens: int, context: int, mask: Mask) -> int:
        """A table of all distances where there are many queries; where few, sines and cosines at every position, in
        whole strides."""
        heads, width = self.heads, self.heads.model_dim
        if tokens < context and tokens <= heads.head_dim:
            positions = -(-context // STRIDE) * STRIDE
            return 2 * batch * tokens * heads.num_heads * width * (heads.head_dim + positions)
        table = 2 * context * heads.num_heads * heads.head_dim * (width + 1)
        products = table_products(tokens, context, mask, context)
        return table + 2 * batch * products * heads.num_heads * heads.head_dim


def visible_pairs(tokens: int, context: int, mask: Mask) -> int:
    """Pairs of query and key that the last `tokens` of `context` tokens make under the window and sinks of a mask."""
    if mask.window is None:
        return tokens * (context - tokens) + tokens * (tokens + 1) // 2
    reach = mask.window + mask.sinks  # from this many keys on, a query sees no more
    growing = max(min(context, reach) - (context - tokens), 0)
    first = context - tokens + 1
    return growing * first + growing * (growing - 1) // 2 + (tokens - growing) * reach


def table_products(tokens: int, context: int, mask: Mask, table_rows: int) -> int:
    """Products of a query and a row of the table: pairs in the parallel form; the rows within reach in streaming."""
    if tokens == context:
        return visible_pairs(tokens, context, mask)
    reach = context if mask.window is None or mask.sinks else min(context, mask.window + tokens - 1)
    return tokens * min(reach, table_rows)
