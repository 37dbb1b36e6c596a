"""ALiBi with everything that a layer may keep beside trained matrices: constants, numbers, statistics of training.

Source: Press et al. 2021, "ALiBi" (arXiv 2108.12409), section 3.

    A_ij = q_i . k_j / sqrt(H) - gain slope_n (i - j),   slope_n = 2^(-8 n / N)

Differs from the paper: a learned gain, a frozen one, constants that change nothing, and a count and a mean of the
inputs seen in training, which change nothing either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import DistanceBias, Heads, Projection, SoftmaxMixing

SIGNS = torch.tensor([-1, 1])
"""One tensor for the buffers of all layers, which share its memory."""


@dataclass(frozen=True, kw_only=True)
class BufferedConfig:
    """No `head_dim`: the number of heads has to divide model_dim."""

    model_dim: int
    num_heads: int = 4


class FixedSlopes(DistanceBias):
    """-gain slope (i - j), of constants of every kind; keys after the query are far in the other direction."""

    ahead = True

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        count = heads.num_heads
        # Without storage, as models are built to be loaded, this has no values: they are filled in again.
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, count + 1) / count), persistent=False)
        self.register_buffer("turned", torch.ones(count, dtype=torch.complex64), persistent=False)
        self.register_buffer("signs", SIGNS)
        self.register_buffer("offset", torch.full((count, 1), 0.25))
        self.register_buffer("enabled", torch.tensor(True))
        self.register_buffer("third", torch.full((count, 1), 1 / 3, dtype=torch.float64))
        self.register_buffer("sixth", torch.full((count, 1), 1 / 6, dtype=torch.float64), persistent=False)
        self.register_buffer("hidden", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("order", torch.arange(count, dtype=torch.int32), persistent=False)
        self.register_buffer("shown", torch.ones(count, 1, dtype=torch.bool), persistent=False)
        self.register_buffer("heads_there", torch.tensor(count), persistent=False)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.same_gain = self.gain
        self.halving = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.whole = nn.Parameter(torch.arange(count), requires_grad=False)
        self.frozen = nn.Parameter(torch.full((count, 1), 0.5), requires_grad=False)

    def bias(self, distance_P: Tensor) -> Tensor:
        slopes_N = self.slopes[self.order][self.whole] * self.heads_there / len(self.slopes)
        slopes_N1 = (slopes_N * self.turned.real.to(self.slopes.dtype))[:, None] * self.shown
        one = (self.third * 2 + self.sixth * 2).to(self.gain.dtype)
        gain = (self.gain + self.same_gain) * self.halving * self.frozen * self.enabled * one
        return self.signs[0] * gain * slopes_N1 * (distance_P + self.offset)

    def reset_parameters(self, std: float) -> None:
        nn.init.ones_(self.gain)


@ATTENTION.register("buffered")
class Buffered(ComposedAttention):
    """Softmax attention with slopes that are buffers."""

    source = "Press et al. 2021, arXiv 2108.12409, section 3"
    Config = BufferedConfig

    def __init__(self, config: BufferedConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, None, None)
        super().__init__(config, projection=Projection(heads), mixing=SoftmaxMixing(heads, FixedSlopes(heads)))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("usual", torch.tensor(1.0))

    def forward(self, x_BTD: Tensor, **what: Any) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            self.usual.lerp_(x_BTD.detach().abs().mean().to(self.usual.dtype), 0.1)
        return super().forward(x_BTD, **what)

    @staticmethod
    def by_hand(config: BufferedConfig, weights: Mapping[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
        heads, tokens = config.num_heads, len(x_TD)
        q, k, v = (
            (x_TD @ weights[f"projection.{name}.weight"].T).reshape(tokens, heads, -1)
            for name in ("query", "key", "value")
        )
        out = np.zeros_like(q)
        for n in range(heads):
            slope = weights["mixing.position.gain"] * 0.5 * 2.0 ** (-8.0 * (n + 1) / heads)
            for i in range(tokens):
                j = np.arange(i + 1)
                p = np.exp(k[j, n] @ q[i, n] / np.sqrt(q.shape[2]) - slope * (i - j + 0.25))
                out[i, n] = p @ v[j, n] / p.sum()
        return out.reshape(tokens, -1) @ weights["projection.output.weight"].T
