"""Softmax attention whose scores have a bias that is a function of positions and head.

Source: ALiBi (Press et al. 2021, arXiv 2108.12409), T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

    A_ij = q_i . k_j / sqrt(H) + b(i, j, n),   o_i = sum_{j<=i} softmax_j(A_ij) v_j

with b = -|i - j| / 2^(n+1) ("alibi"); a learned number for each of few buckets of |i - j| ("buckets"); or -inf for
every third key but the query's own, others in each head, and -j / 8 else ("strided"). Differs from the papers: T5 has
32 buckets and no scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import Heads, Projection, ScoreBias, SoftmaxMixing
from attnzoo.types import CheckedConfig

BUCKETS = 5


@dataclass(frozen=True, kw_only=True)
class BiasedConfig(CheckedConfig):
    """bias: which; by_distance: it depends on i - j alone, and is computed so."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bias: Literal["alibi", "buckets", "strided"] = "strided"
    by_distance: bool = False
    window: int | None = None


class Buckets(nn.Module):
    """A learned number for each head and bucket of distances 0, 1, 2-3, 4-7 and more."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, BUCKETS))

    def forward(self, i: Tensor, j: Tensor, head: Tensor) -> Tensor:
        steps = torch.tensor([1, 2, 4, 8], device=i.device)
        return self.table[head, torch.bucketize((i - j).abs(), steps, right=True)]


@ATTENTION.register("biased")
class Biased(ComposedAttention):
    """Softmax attention with a function of positions and head added to its scores."""

    source = "Press et al. 2021, arXiv 2108.12409; Raffel et al. 2020, arXiv 1910.10683"
    Config = BiasedConfig
    cases = ({"bias": "alibi", "window": 4}, {"bias": "buckets", "by_distance": True, "num_kv_heads": 1})

    def __init__(self, config: BiasedConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        functions = {
            "alibi": lambda i, j, head: -(i - j).abs() / 2 ** (head + 1),
            "buckets": Buckets(heads.num_heads) if config.bias == "buckets" else None,
            "strided": lambda i, j, head: torch.where(((j + head) % 3 == 1) & (j != i), -math.inf, -j / 8),
        }
        position = ScoreBias(heads, functions[config.bias], by_distance=config.by_distance, ahead=True)
        mixing = SoftmaxMixing(heads, position, window=config.window)
        super().__init__(config, projection=Projection(heads), mixing=mixing)

    @staticmethod
    def by_hand(config: BiasedConfig, weights: Mapping[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
        tokens, heads = len(x_TD), config.num_heads
        kv_heads = config.num_kv_heads or heads
        q, k, v = (
            (x_TD @ weights[f"projection.{name}.weight"].T).reshape(tokens, count, -1)
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        out = np.zeros_like(q)
        for n in range(heads):
            kv = n * kv_heads // heads
            for i in range(tokens):
                seen = [j for j in range(i + 1) if config.window is None or i - j < config.window]
                if config.bias == "strided":
                    seen = [j for j in seen if j == i or (j + n) % 3 != 1]
                j = np.array(seen)
                if config.bias == "buckets":
                    table = weights["mixing.position.function.table"][n]
                    bias = np.array([table[sum(i - at >= edge for edge in (1, 2, 4, 8))] for at in seen])
                else:
                    bias = -j / 8 if config.bias == "strided" else -(i - j) / 2 ** (n + 1)
                p = np.exp(k[j, kv] @ q[i, n] / np.sqrt(q.shape[2]) + bias)
                out[i, n] = p @ v[j, kv] / p.sum()
        return out.reshape(tokens, -1) @ weights["projection.output.weight"].T
