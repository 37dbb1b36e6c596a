"""<Name>: <what it does, in one line>.

Source: <authors, year, title (arXiv id), section or equation>.

    <the formula, with the symbols of the code>

Differs from the paper: <everything that does, or "nothing">.

Copy this file to `attention/mine.py`, write your idea, and run `pytest tests/contract -k mine`. As it stands
it is multi-head attention with a learned slope per head on the distance (as ALiBi, arXiv 2108.12409, has a fixed
one): replace `Slope` by your own part, or choose among those of `attnzoo/attention/parts`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import QKV, Heads, Position, Projection, SoftmaxMixing
from attnzoo.ops.impl import Impl
from attnzoo.ops.masks import CausalMask
from attnzoo.ops.relative_sdpa import relative_sdpa


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """Every option is a field with a type and a default; model_dim comes first and has none."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_distance: int = 256


class Slope(Position):
    """A_ij = q_i . k_j - slope * min(i - j, max_distance - 1): the table form with S filled from one number."""

    kind = "table"

    def __init__(self, heads: Heads, max_distance: int) -> None:
        super().__init__()
        self.heads, self.max_distance = heads, max_distance
        self.slope = nn.Parameter(torch.empty(heads.num_heads))
        self.reset_parameters(0.0)

    def attend(self, qkv: QKV, mask: CausalMask, impl: Impl) -> Tensor:
        distance_P = torch.arange(self.max_distance, device=self.slope.device)
        heads, head_dim = self.heads.num_heads, self.heads.head_dim
        return relative_sdpa(
            *qkv,
            content_bias_NH=self.slope.new_zeros(heads, head_dim),
            table_NPH=self.slope.new_zeros(heads, self.max_distance, head_dim),
            table_bias_NP=-self.slope[:, None] * distance_P,
            mask=mask,
            impl=impl,
        )

    def reset_parameters(self, std: float) -> None:
        heads = self.heads.num_heads
        with torch.no_grad():
            self.slope.copy_(2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))


@ATTENTION.register("mine")
class Mine(ComposedAttention):
    """One line for `python -m attnzoo list`."""

    source = "authors year, arXiv id, section"
    Config = MineConfig

    def __init__(self, config: MineConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(
            config,
            projection=Projection(heads),
            mixing=SoftmaxMixing(heads, Slope(heads, config.max_distance)),
        )
