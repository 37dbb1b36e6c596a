"""Multi-dconv-head attention: q, k and v pass a short causal convolution over time before they meet.

Source: So et al. 2021, "Primer" (arXiv 2109.08668), section 4.

    q_t <- w2 q_t + w1 q_{t-1} + w0 q_{t-2}   (k and v likewise, own kernels, zeros before the start)
    o_i = sum_{j<=i} softmax_j(q_i . k_j / sqrt(H)) v_j

Differs from the paper: rotary positions by default, where Primer adds position embeddings to the input
(position="none" leaves order to the convolution and causality). conv_init="primer", one kernel per head and
channel and no bias are Primer's; conv_init="uniform" with conv_share_heads and conv_bias are what the RCMHA
authors' base uses.
"""

from dataclasses import dataclass
from typing import Literal

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import (
    ConvInit,
    Heads,
    NoPosition,
    Projection,
    QKVConv,
    Rope,
    SoftmaxMixing,
)
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class MDHAConfig(CheckedConfig):
    """`conv_share_heads`: one kernel per channel for all heads instead of one per head and channel.

    `window`, `sinks`: each token sees the last `window` tokens and the first `sinks` ones; None: all.
    `qkv_bias`, `output_bias`: of the linear maps (labml's code has all of them).
    """

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: Literal["rope", "none"] = "rope"
    rope_theta: float = 10000.0
    window: int | None = None
    sinks: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    conv_width: int = 3
    conv_share_heads: bool = False
    conv_bias: bool = False
    conv_init: ConvInit = "primer"


@ATTENTION.register("mdha")
class MDHA(ComposedAttention):
    """Softmax attention over convolved queries, keys and values."""

    source = "So et al. 2021, arXiv 2109.08668, section 4"
    Config = MDHAConfig

    def __init__(self, config: MDHAConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        position = Rope(heads, config.rope_theta) if config.position == "rope" else NoPosition()
        super().__init__(
            config,
            projection=Projection(
                heads,
                query_bias=config.qkv_bias,
                key_bias=config.qkv_bias,
                value_bias=config.qkv_bias,
                output_bias=config.output_bias,
            ),
            mixing=SoftmaxMixing(heads, position, window=config.window, sinks=config.sinks),
            conv=QKVConv(
                heads,
                width=config.conv_width,
                share_heads=config.conv_share_heads,
                bias=config.conv_bias,
                init=config.conv_init,
            ),
        )
