"""Mesa layer: every token is answered by ridge regression over all keys and values so far.

Source: von Oswald et al. 2023, "Uncovering mesa-optimization algorithms in Transformers" (arXiv 2309.05858), section 4.

    o_t = (sum_{s<=t} v_s k_s^T) (sum_{s<=t} k_s k_s^T + ridge I)^-1 q_t

The weights of that map minimise sum_s |W k_s - v_s|^2 + ridge |W|^2, which one layer of linear attention only takes a
step towards. The state are the two sums, [H, H] each, whatever the context.

Differs from the paper: the sums are solved against (Cholesky) instead of an inverse being updated, ridge is one learned
positive number a kv head instead of a matrix, there is no forgetting, and heads share keys and values if asked.
"""

import math
from dataclasses import dataclass

import torch

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import Heads, MesaMixing, Projection
from attnzoo.derived_memory import PassMemory, extrapolated
from attnzoo.ops.linear_attention.weights import tokens_per_block
from attnzoo.types import CheckedConfig, accumulation_dtype

LEAST_STEP = 1024
"""Tokens from which on the blocks hold most, not the projections. A multiple of the ridge's blocks of 64."""


@dataclass(frozen=True, kw_only=True)
class MesaConfig(CheckedConfig):
    """`ridge`: the regulariser's value at first."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    ridge: float = 1.0


@ATTENTION.register("mesa")
class Mesa(ComposedAttention):
    """Ridge regression over keys and values so far: state of constant size."""

    source = "von Oswald et al. 2023, arXiv 2309.05858, section 4"
    Config = MesaConfig

    def __init__(self, config: MesaConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(config, projection=Projection(heads), mixing=MesaMixing(heads, ridge=config.ridge))

    def memory_by_hand(self, batch: int, tokens: int, dtype: torch.dtype) -> PassMemory:
        """Autograd knows every block of tokens, so that a run of many, even without values, would take minutes."""
        heads = self.projection.heads
        block = tokens_per_block(batch, heads.num_heads * heads.head_dim, accumulation_dtype(dtype))
        step = math.ceil(LEAST_STEP / block) * block
        return extrapolated(lambda few: self.derived_memory(batch, few, dtype), tokens, step)
