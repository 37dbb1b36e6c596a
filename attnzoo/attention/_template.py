"""Attention with a learned slope on the distance: scores of distant tokens fall in a straight line.

Source: Press, Smith, Lewis 2021, ALiBi (arXiv 2108.12409), section 3; here the slopes, one a head, are learned.

    A_ij = q_i . k_j / sqrt(H) - slope (i - j),   o_i = sum_{j<=i} softmax_j(A_ij) v_j
"""

# Copy this file and write your idea: replace `Slope` by a part of your own, or choose among `attnzoo/attention/parts`.
# `attnzoo describe mine` prints the text above. `pytest tests/contract -k mine` holds it to the contract.

from dataclasses import dataclass
from typing import Any

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


class Slope(DistanceBias):
    """-slope (i - j), however far; at first the slopes of ALiBi, 2^(-8 n / N) for head n = 1..N."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        self.slope = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters(0.0)

    def bias(self, distance_P: Tensor) -> Tensor:
        return -self.slope[:, None] * distance_P

    def reset_parameters(self, std: float) -> None:
        with torch.no_grad():
            self.slope.copy_(2.0 ** (-8.0 * torch.arange(1, len(self.slope) + 1) / len(self.slope)))


@ATTENTION.register("mine")
class Mine(ComposedAttention):
    """Softmax attention; a learned slope on the distance."""

    source = "Press et al. 2021, arXiv 2108.12409, section 3"
    Config = MineConfig

    def __init__(self, config: MineConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, None, None)
        super().__init__(config, projection=Projection(heads), mixing=SoftmaxMixing(heads, Slope(heads)))

    @staticmethod
    def by_hand(config: MineConfig, weights: Any, x_TD: np.ndarray) -> np.ndarray:
        """The formula once more, in numpy: the contract holds the rest to it. weights: arrays by their names."""
        maps = (weights[f"projection.{name}.weight"] for name in ("query", "key", "value"))
        q, k, v = ((x_TD @ w.T).reshape(len(x_TD), config.num_heads, -1) for w in maps)
        out = np.zeros_like(q)
        for i, n in np.ndindex(q.shape[:2]):
            distance = i - np.arange(i + 1)
            scores = k[: i + 1, n] @ q[i, n] / q.shape[2] ** 0.5 - weights["mixing.position.slope"][n] * distance
            p = np.exp(scores - scores.max())
            out[i, n] = p @ v[: i + 1, n] / p.sum()
        return out.reshape(len(x_TD), -1) @ weights["projection.output.weight"].T
