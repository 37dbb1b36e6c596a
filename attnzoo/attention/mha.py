"""Multi-head attention, with grouped kv heads and rotary positions as options.

Source: Vaswani et al. 2017, "Attention Is All You Need" (arXiv 1706.03762), section 3.2.2; grouped kv heads from
Ainslie et al. 2023 (arXiv 2305.13245); rotary positions from Su et al. 2021 (arXiv 2104.09864), eq. 34.

    o_i = sum_{j<=i} softmax_j(q_i . k_j / sqrt(H)) v_j,   q, k, v = x W_q, x W_k, x W_v per head

Differs from the paper: causal, no dropout, biases off unless asked for; rotary positions in place of added
sinusoids. With `num_kv_heads` and `position="rope"` this is the attention of Llama (arXiv 2302.13971), with `window`
that of Mistral (arXiv 2310.06825), with `qkv_bias` that of Qwen2 (arXiv 2407.10671), and with `qk_norm`, an RMSNorm
of every head of q and k before rotation, that of Qwen3 (arXiv 2505.09388).
"""

from dataclasses import dataclass
from typing import Literal

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import Heads, NoPosition, Projection, Rope, SoftmaxMixing
from attnzoo.ops.rope import RopeScaling
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class MHAConfig(CheckedConfig):
    """Sizes default to one kv head a query head and head_dim = model_dim / num_heads.

    `window`, `sinks`: each token sees the last `window` tokens and the first `sinks` ones; None: all.
    `rope_scaling`: the fields of `attnzoo.ops.rope.RopeScaling`. `norm_eps`: epsilon of `qk_norm`.
    """

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: Literal["rope", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    window: int | None = None
    sinks: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6


@ATTENTION.register("mha")
class MHA(ComposedAttention):
    """Softmax attention; order from rotation, or from nothing."""

    source = "Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2"
    Config = MHAConfig

    def __init__(self, config: MHAConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        scaling = RopeScaling.of(config.rope_scaling)
        if scaling is not None and config.position != "rope":
            raise ValueError(f"rope_scaling needs position='rope', and position={config.position!r}; leave one out")
        position = Rope(heads, config.rope_theta, scaling) if config.position == "rope" else NoPosition()
        super().__init__(
            config,
            projection=Projection(
                heads,
                query_bias=config.qkv_bias,
                key_bias=config.qkv_bias,
                value_bias=config.qkv_bias,
                output_bias=config.output_bias,
                qk_norm_eps=config.norm_eps if config.qk_norm else None,
            ),
            mixing=SoftmaxMixing(heads, position, window=config.window, sinks=config.sinks),
        )
