"""Attention with a learned slope on the distance: scores of distant tokens fall in a straight line.

Source: Press, Smith, Lewis 2021, ALiBi (arXiv 2108.12409), section 3.

    A_ij = q_i . k_j / sqrt(H) - slope (i - j),   o_i = sum_{j<=i} softmax_j(A_ij) v_j

Differs from the paper: the slopes, one a head, are learned; they begin as those of the paper.
"""

# Copy this file to a place of your own (or, in the tree, to attention/<name>.py) and write your idea: replace `Slope`
# by your own part, or choose among those of `attnzoo/attention/parts`. `attnzoo describe mine` prints the text above;
# say there what yours is. `pytest tests/contract -k mine` holds it to the contract.

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import DistanceBias, Heads, Projection, SoftmaxMixing
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class MineConfig(CheckedConfig):
    """Every option is a field with a type and a default; model_dim comes first and has none."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None


class Slope(DistanceBias):
    """-slope (i - j), however far; at first the slopes of ALiBi, 2^(-8 n / N) for head n = 1..N."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.slope = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters(0.0)

    def bias(self, distance_P: Tensor) -> Tensor:
        return -self.slope[:, None] * distance_P

    def reset_parameters(self, std: float) -> None:
        heads = self.heads.num_heads
        with torch.no_grad():
            self.slope.copy_(2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))


@ATTENTION.register("mine")
class Mine(ComposedAttention):
    """Softmax attention; a learned slope on the distance."""

    source = "Press et al. 2021, arXiv 2108.12409, section 3"
    Config = MineConfig
    cases = ({}, {"num_kv_heads": 1})

    def __init__(self, config: MineConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(config, projection=Projection(heads), mixing=SoftmaxMixing(heads, Slope(heads)))

    @staticmethod
    def by_hand(config: MineConfig, weights: Mapping[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
        """The formula once more, in numpy and without the project's code: what the contract holds the rest to."""
        tokens, heads = len(x_TD), config.num_heads
        kv_heads = config.num_kv_heads or heads
        q, k, v = (
            (x_TD @ weights[f"projection.{name}.weight"].T).reshape(tokens, count, -1)
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        )
        out = np.zeros_like(q)
        for n in range(heads):
            kv = n * kv_heads // heads  # the kv head that query head n reads
            for i in range(tokens):
                distance = i - np.arange(i + 1)
                scores = k[: i + 1, kv] @ q[i, n] / q.shape[2] ** 0.5 - weights["mixing.position.slope"][n] * distance
                p = np.exp(scores - scores.max())
                out[i, n] = p @ v[: i + 1, kv] / p.sum()
        return out.reshape(tokens, -1) @ weights["projection.output.weight"].T
