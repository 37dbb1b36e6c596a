"""Relative multi-head attention: order enters the scores as a function of the distance i - j.

Source: Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860), section 3.3. Two forms:

    position="sinusoid" (the paper's own, W_R: model_dim -> heads, u and v learned):
        A_ij = q_i.k_j + q_i.(W_R r_{i-j}) + u.k_j + v.(W_R r_{i-j}),   r_n = [sin(n w) ; cos(n w)]
    position="table" (as the RCMHA authors use it, arXiv 2308.03429; R, S and u learned, zero at first):
        A_ij = (q_i + u).k_j + q_i.R[i-j] + S[i-j]

    o_i = sum_{j<=i} softmax_j(A_ij / sqrt(H)) v_j

Differs from the paper: the recurrence over segments is not part of the variant; the streaming state plays its
part. The table holds distances 0..max_distance-1 only (a causal model reads no others), and farther ones use its
last row.
"""

from dataclasses import dataclass
from typing import Literal

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import Heads, Projection, RelativeSinusoid, RelativeTable, SoftmaxMixing
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class RMHAConfig(CheckedConfig):
    """`max_distance`: rows of the table; only read by position="table". `max_ahead`: rows of the table for keys after
    the query; 0: masks that show such keys are refused.

    `window`, `sinks`: each token sees the last `window` tokens and the first `sinks` ones; None: all.
    `qkv_bias`, `output_bias`: of the linear maps; position="table" has the value's in any case, as labml's code.
    """

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: Literal["table", "sinusoid"] = "table"
    max_distance: int = 256
    max_ahead: int = 0
    window: int | None = None
    sinks: int = 0
    qkv_bias: bool = False
    output_bias: bool = False


@ATTENTION.register("rmha")
class RMHA(ComposedAttention):
    """Softmax attention over content and distance."""

    source = "Dai et al. 2019, arXiv 1901.02860, section 3.3"
    Config = RMHAConfig

    def __init__(self, config: RMHAConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        table = config.position == "table"
        position = RelativeTable(heads, config.max_distance, config.max_ahead) if table else RelativeSinusoid(heads)
        super().__init__(
            config,
            projection=Projection(
                heads,
                query_bias=config.qkv_bias,
                key_bias=config.qkv_bias,
                value_bias=table or config.qkv_bias,
                output_bias=config.output_bias,
            ),
            mixing=SoftmaxMixing(heads, position, window=config.window, sinks=config.sinks),
        )
