"""Attention with a learned decay of the distance, as a plain module: forward and nothing more."""

import torch
from torch import Tensor, nn

from attnzoo.attention import ATTENTION


@ATTENTION.register("plain")
class Plain(nn.Module):
    """Softmax attention; scores fall with the distance.

    Source: Press et al. 2021, arXiv 2108.12409, section 3
    """

    cases = ({"num_heads": 1, "bias": True},)

    def __init__(self, model_dim: int, num_heads: int = 4, *, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(model_dim, 3 * model_dim, bias=bias)
        self.out = nn.Linear(model_dim, model_dim, bias=bias)
        self.slope = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.calls += 1
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        at = torch.arange(x.shape[1], device=x.device)
        distance = at[:, None] - at
        scores = q @ k.mT / q.shape[-1] ** 0.5 - self.slope * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        return self.out((self.dropout(weights) @ v).transpose(1, 2).flatten(2))
