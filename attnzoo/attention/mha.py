"""Multi-head attention, with grouped kv heads and rotary positions as options.

Source: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.2.2; grouped kv heads from
Ainslie et al. 2023 (arXiv 2305.13245); rotary positions from Su et al. 2021 (arXiv 2104.09864), eq. 34.

    o_i = sum_{j<=i} softmax_j(q_i . k_j / sqrt(H)) v_j,   q, k, v = x W_q, x W_k, x W_v per head

Differs from the paper: causal, no dropout, biases off unless asked for; rotary positions in place of added
sinusoids. With `num_kv_heads` and `position="rope"` this is the attention of Llama.
"""

from dataclasses import dataclass
from typing import Literal

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import Heads, NoPosition, Projection, Rope, SoftmaxMixing


@dataclass(frozen=True, kw_only=True)
class MHAConfig:
    """Sizes default to one kv head a query head and head_dim = model_dim / num_heads.

    `window`, `sinks`: each token sees the last `window` tokens and the first `sinks` ones; None: all.
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


@ATTENTION.register("mha")
class MHA(ComposedAttention):
    """Softmax attention; order from rotation, or from nothing."""

    source = "Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2"
    Config = MHAConfig

    def __init__(self, config: MHAConfig) -> None:
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
        )
