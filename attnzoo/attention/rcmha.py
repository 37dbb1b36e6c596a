"""Relative convolutional multi-head attention: RMHA's table over MDHA's convolved q, k and v.

Source: Sugiharto et al. 2023, "RCMHA" (arXiv 2308.03429), section 3; built from Transformer-XL's relative scores
(arXiv 1901.02860, section 3.3) and Primer's depthwise convolution (arXiv 2109.08668, section 4).

    q, k, v <- causal depthwise convolutions of x W_q, x W_k, x W_v + b_v
    A_ij = (q_i + u).k_j + q_i.R[i-j] + S[i-j],   o_i = sum_{j<=i} softmax_j(A_ij / sqrt(H)) v_j

Differs from the paper: the convolution carries its last rows from chunk to chunk, so that streaming is the same
function as the parallel form; the table has max_distance rows instead of 8192. One kernel per head and channel,
no bias and Primer's initialisation are the defaults; the authors' base shares kernels over heads with a bias
(conv_share_heads, conv_bias, conv_init="uniform").
"""

from dataclasses import dataclass

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import ConvInit, Heads, Projection, QKVConv, RelativeTable, SoftmaxMixing
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class RCMHAConfig(CheckedConfig):
    """`max_distance`: rows of the position table; `max_ahead`: rows of it for keys after the query, 0: masks that show
    such keys are refused; `conv_share_heads`: one kernel per channel for all heads.

    `window`, `sinks`: each token sees the last `window` tokens and the first `sinks` ones; None: all.
    `qkv_bias`, `output_bias`: of the linear maps; the value's is there in any case, as in the authors' code.
    """

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_distance: int = 256
    max_ahead: int = 0
    window: int | None = None
    sinks: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    conv_width: int = 3
    conv_share_heads: bool = False
    conv_bias: bool = False
    conv_init: ConvInit = "primer"


@ATTENTION.register("rcmha")
class RCMHA(ComposedAttention):
    """Softmax attention over content and distance, of convolved queries, keys and values."""

    source = "Sugiharto et al. 2023, arXiv 2308.03429, section 3"
    Config = RCMHAConfig

    def __init__(self, config: RCMHAConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(
            config,
            projection=Projection(
                heads,
                query_bias=config.qkv_bias,
                key_bias=config.qkv_bias,
                value_bias=True,
                output_bias=config.output_bias,
            ),
            mixing=SoftmaxMixing(
                heads,
                RelativeTable(heads, config.max_distance, config.max_ahead),
                window=config.window,
                sinks=config.sinks,
            ),
            conv=QKVConv(
                heads,
                width=config.conv_width,
                share_heads=config.conv_share_heads,
                bias=config.conv_bias,
                init=config.conv_init,
            ),
        )
