"""What a decoder is made of besides attention: norms, MLPs, and the pre-norm block."""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.kvcache.state import State

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu", "relu"]


def build_norm(kind: Norm, dim: int) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) with a learned gain, epsilon 1e-5."""
    return nn.RMSNorm(dim, eps=1e-5) if kind == "rmsnorm" else nn.LayerNorm(dim, eps=1e-5)


class MLP(nn.Module):
    """down(act(up x)); with "swiglu", down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202). No biases."""

    def __init__(self, kind: Activation, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False) if kind == "swiglu" else None
        self.down = nn.Linear(hidden, dim, bias=False)
        self.activation: Callable[[Tensor], Tensor] = F.relu if kind == "relu" else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = self.activation(up) if self.gate is None else F.silu(self.gate(x)) * up
        out: Tensor = self.down(hidden)
        return out

    def reset_parameters(self, std: float, output_std: float) -> None:
        for layer in (self.up, self.gate, self.down):
            if layer is not None:
                nn.init.normal_(layer.weight, std=output_std if layer is self.down else std)

    def flops(self, batch: int, tokens: int) -> int:
        """Two FLOPs a weight and token."""
        return 2 * batch * tokens * sum(p.numel() for p in self.parameters())


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, attention: Attention, mlp: MLP, norm: Norm, dim: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(norm, dim)
        self.attention = attention
        self.mlp_norm = build_norm(norm, dim)
        self.mlp = mlp

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out

    def extend(self, x_BTD: Tensor, state: Any, counts_B: Tensor | None) -> tuple[Tensor, State]:
        mixed, state = self.attention.extend(self.attention_norm(x_BTD), state, counts_B)
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state
