"""Attention-free transformer, simple form: a gated running mean of values, written without the project's parts.

Source: Zhai et al. 2021, "An Attention Free Transformer" (arXiv 2105.14103), section 3.1, causal.

    y_t = W_o (sigmoid(q_t) * sum_{s<=t} exp(k_s) v_s / sum_{s<=t} exp(k_s))

Differs from the paper: nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION, Cost, StreamingAttention, Traits
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.masks import Mask
from attnzoo.types import accumulation_dtype, dtype_bytes


@dataclass(frozen=True, kw_only=True)
class RunningMeanConfig:
    """The size is all there is."""

    model_dim: int


@dataclass
class RunningMeanState(State):
    """The two running sums, [B, 2, D]."""

    sums_B2D: Tensor


@ATTENTION.register("running_mean")
class RunningMean(StreamingAttention):
    """A gated running mean of values."""

    source = "Zhai et al. 2021, arXiv 2105.14103, section 3.1"
    Config = RunningMeanConfig

    def __init__(self, config: RunningMeanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.model_dim
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    @property
    def traits(self) -> Traits:
        return Traits(growth="O(1)")

    def init_state(
        self, batch: int, capacity: int, *, device: Any = None, dtype: Any = None, cache: Any = None
    ) -> RunningMeanState:
        if cache is not None:
            raise ValueError("cache: RunningMean keeps two sums and no keys to compress; use cache=None")
        weight = self.output.weight
        dtype = accumulation_dtype(dtype or weight.dtype)
        return RunningMeanState(new_zeros(batch, 2, self.config.model_dim, device=device or weight.device, dtype=dtype))

    def forward(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        self.check_input(x_BTD, context_BSD, mask)
        return self.extend(x_BTD, self.init_state(len(x_BTD), 0))[0]

    def extend(
        self, x_BTD: Tensor, state: RunningMeanState, counts_B: Tensor | None = None
    ) -> tuple[Tensor, RunningMeanState]:
        self.check_chunk(x_BTD, len(state.sums_B2D), counts_B)
        tokens, dtype = x_BTD.shape[1], state.sums_B2D.dtype
        weight = self.key(x_BTD).to(dtype).exp()
        added = torch.stack([weight * self.value(x_BTD), weight], dim=2)
        sums = torch.cat([state.sums_B2D[:, None], added], dim=1).cumsum(1)
        mean = sums[:, 1:, 0] / sums[:, 1:, 1]
        y_BTD = self.output(self.query(x_BTD).sigmoid() * mean.to(x_BTD.dtype))
        if counts_B is None:
            return y_BTD, RunningMeanState(sums[:, tokens].clone())
        # The sum after the last real token: padding may hold NaN and must not be summed.
        rows = torch.arange(len(x_BTD), device=x_BTD.device)
        return y_BTD, RunningMeanState(sums[rows, counts_B])

    def reference(self, x_BTD: Tensor, *, context_BSD: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        self.check_input(x_BTD, context_BSD, mask)
        rows = []
        for t in range(x_BTD.shape[1]):
            weight = self.key(x_BTD[:, : t + 1]).exp()
            mean = (weight * self.value(x_BTD[:, : t + 1])).sum(1) / weight.sum(1)
            rows.append(self.output(self.query(x_BTD[:, t]).sigmoid() * mean))
        return torch.stack(rows, dim=1) if rows else x_BTD.new_zeros(x_BTD.shape)

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        dim, dtype = self.config.model_dim, self.output.weight.dtype
        row = batch * tokens * dim * dtype_bytes(dtype)
        return Cost(
            flops=8 * batch * tokens * dim * dim,
            bytes_moved=4 * dim * dim * dtype_bytes(dtype) + 2 * row,
            state_bytes=2 * batch * dim * dtype_bytes(accumulation_dtype(dtype)),
            parameters=4 * dim * dim,
        )

    def reset_parameters(self, std: float, output_std: float) -> None:
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=output_std if layer is self.output else std)

    @staticmethod
    def by_hand(config: RunningMeanConfig, weights: Mapping[str, np.ndarray], x_TD: np.ndarray) -> np.ndarray:
        q, k, v = (x_TD @ weights[f"{name}.weight"].T for name in ("query", "key", "value"))
        rows = [(np.exp(k[: t + 1]) * v[: t + 1]).sum(0) / np.exp(k[: t + 1]).sum(0) for t in range(len(x_TD))]
        return (np.stack(rows) / (1 + np.exp(-q))) @ weights["output.weight"].T
