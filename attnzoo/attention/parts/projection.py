"""Linear maps into heads and back, with fewer kv heads than query heads if asked."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Sizes shared by all parts of one variant. Raises ValueError when they do not divide."""

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> "Heads":
        """Fills in defaults: as many kv heads as query heads, head_dim = model_dim / num_heads."""
        sizes = {"model_dim": model_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                way_out = ", or None for the default" if name in ("num_kv_heads", "head_dim") else ""
                raise ValueError(f"{name}={size} must be at least 1{way_out}")
        if head_dim is None and model_dim % num_heads:
            raise ValueError(
                f"model_dim={model_dim} is not a multiple of num_heads={num_heads}; change one of them or set head_dim"
            )
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} is not a multiple of num_kv_heads={kv_heads}; change one of them")
        return cls(
            model_dim=model_dim,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim or model_dim // num_heads,
        )


class Projection(nn.Module):
    """q, k, v = x W_q, x W_k, x W_v per head, and the output map; biases as asked.

    `qk_norm_eps`: epsilon of an RMSNorm over the channels of every head of q and of k; None: no norm.
    """

    def __init__(
        self,
        heads: Heads,
        *,
        query_bias: bool = False,
        key_bias: bool = False,
        value_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        query_width = heads.num_heads * heads.head_dim
        kv_width = heads.num_kv_heads * heads.head_dim
        self.query = nn.Linear(heads.model_dim, query_width, bias=query_bias)
        self.key = nn.Linear(heads.model_dim, kv_width, bias=key_bias)
        self.value = nn.Linear(heads.model_dim, kv_width, bias=value_bias)
        self.output = nn.Linear(query_width, heads.model_dim, bias=output_bias)
        self.joined: Callable[[Tensor], Tensor] | None = None
        """q, k and v by one product, where weights have been packed for inference."""
        normed = qk_norm_eps is not None
        self.query_norm = nn.RMSNorm(heads.head_dim, eps=qk_norm_eps) if normed else None
        self.key_norm = nn.RMSNorm(heads.head_dim, eps=qk_norm_eps) if normed else None

    def forward(self, x_BTD: Tensor, context_BSD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(q_BTNH, k_BTKH, v_BTKH); with a context, k_BSKH and v_BSKH of it."""
        head_dim = self.heads.head_dim
        if self.joined is None:
            if self.query.weight.is_meta and not x_BTD.is_meta:
                raise ValueError("the layer has no weights (device meta) and x has values; move the layer or x")
            read = x_BTD if context_BSD is None else context_BSD
            q, k, v = self.query(x_BTD), self.key(read), self.value(self.valued(x_BTD, read))
        elif context_BSD is not None:
            raise ValueError("packed weights project one sequence; give a context to a layer that is not packed")
        else:
            widths = [self.query.out_features, self.key.out_features, self.value.out_features]
            q, k, v = self.joined(x_BTD).split(widths, dim=-1)
        q_BTNH = q.unflatten(-1, (self.heads.num_heads, head_dim))
        k_BTKH = k.unflatten(-1, (self.heads.num_kv_heads, head_dim))
        v_BTKH = v.unflatten(-1, (self.heads.num_kv_heads, head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        return q_BTNH, k_BTKH, v_BTKH

    def valued(self, x_BTD: Tensor, read_BSD: Tensor) -> Tensor:
        """What the value's map reads: the tokens that are read."""
        return read_BSD

    def merge(self, o_BNTH: Tensor) -> Tensor:
        """y_BTD from the heads' outputs."""
        merged: Tensor = self.output(o_BNTH.transpose(1, 2).flatten(2))
        return merged

    def reset_parameters(self, std: float, output_std: float) -> None:
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=output_std if layer is self.output else std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)

    def flops(self, batch: int, tokens: int) -> int:
        """Two FLOPs a weight and token."""
        weights = sum(m.weight.numel() for m in (self.query, self.key, self.value, self.output))
        return 2 * batch * tokens * weights


class PairedProjection(Projection):
    """Values of both sequences: v_s = W_v relu(W [x_s; y_s] + b), y being what is read; q and k as ever.

    Token s of one sequence is paired with token s of the other. Where x has fewer tokens, zeros stand for the others,
    so a token of x that does not exist must hold zeros, too.
    """

    def __init__(self, heads: Heads, hidden_dim: int, *, qkv_bias: bool = False, output_bias: bool = False) -> None:
        super().__init__(heads, query_bias=qkv_bias, key_bias=qkv_bias, output_bias=output_bias)
        self.pair = nn.Linear(2 * heads.model_dim, hidden_dim)
        self.value = nn.Linear(hidden_dim, heads.num_kv_heads * heads.head_dim, bias=qkv_bias)

    def valued(self, x_BTD: Tensor, read_BSD: Tensor) -> Tensor:
        entries = read_BSD.shape[1]
        x_BSD = F.pad(x_BTD[:, :entries], (0, 0, 0, max(entries - x_BTD.shape[1], 0)))
        return F.relu(self.pair(torch.cat([x_BSD, read_BSD], dim=-1)))

    def reset_parameters(self, std: float, output_std: float) -> None:
        super().reset_parameters(std, output_std)
        nn.init.normal_(self.pair.weight, std=std)
        nn.init.zeros_(self.pair.bias)

    def flops(self, batch: int, tokens: int) -> int:
        return super().flops(batch, tokens) + 2 * batch * tokens * self.pair.weight.numel()
