"""Base of the variants that read a whole context at once, as the in-context-learning literature defines them.

The last `num_queries` tokens ask and are not read: keys and values come from the others alone, and every token, asking
or not, reads all of them. So a token depends on later ones: such a variant is not causal, has no streaming form and no
state, and a decoder language model refuses it. With no feature map, bias, norm or scale the maps W_V, W_K, W_Q and P
are square by default, as in the papers. The residual is the caller's: e <- e + layer(e).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Attention, Cost, Traits
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.state import State
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.in_context import Weighting, in_context_attention
from attnzoo.types import CheckedConfig, dtype_bytes


@dataclass(frozen=True, kw_only=True)
class InContextConfig(CheckedConfig):
    """`head_dim`: None means model_dim, the papers' square maps; `num_queries`: last tokens, which are not read."""

    model_dim: int
    num_heads: int = 1
    head_dim: int | None = None
    num_queries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("model_dim", 1), ("num_heads", 1), ("head_dim", 1), ("num_queries", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                way_out = ", or None for model_dim" if name == "head_dim" else ""
                raise ValueError(f"{name}={value} must be at least {least}{way_out}")


class InContextAttention(Attention):
    """y_t = sum_heads P sum_{j: read} W_V e_j weight(W_K e_j, W_Q e_t); subclasses say which weighting."""

    Config = InContextConfig
    implementations = ("reference", "torch")
    weighting: ClassVar[Weighting]

    def __init__(self, config: InContextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * (config.head_dim or config.model_dim)
        self.query = nn.Linear(config.model_dim, width, bias=False)
        self.key = nn.Linear(config.model_dim, width, bias=False)
        self.value = nn.Linear(config.model_dim, width, bias=False)
        self.output = nn.Linear(width, config.model_dim, bias=False)

    @property
    def traits(self) -> Traits:
        return Traits(causal=False, growth="O(1)")

    def forward(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        return self._attend(x_BTD, starts_BT, self.impl)

    def reference(self, x_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        return self._attend(x_BTD, starts_BT, "reference")

    def _attend(self, x_BTD: Tensor, starts_BT: Tensor | None, impl: Impl) -> Tensor:
        if starts_BT is not None:
            raise ValueError(f"{type(self).__name__} takes no starts_BT: a row is one context; give each its own row")
        self.check_input(x_BTD)
        queries, tokens = self.config.num_queries, x_BTD.shape[1]
        if tokens <= queries:
            raise ValueError(f"{tokens} tokens of which the last num_queries={queries} ask leave nothing to read")
        read_BSD = x_BTD[:, : tokens - queries]
        heads = (
            x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
            for x in (self.query(x_BTD), self.key(read_BSD), self.value(read_BSD))
        )
        o_BNTH = in_context_attention(*heads, weighting=self.weighting, impl=impl)
        y_BTD: Tensor = self.output(o_BNTH.transpose(1, 2).flatten(2))
        return y_BTD

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache: CachePolicy | None = None,
    ) -> State:
        raise ValueError(f"{type(self).__name__} is not causal: it has no streaming form; call it on whole sequences")

    def extend(self, x_BTD: Tensor, state: Any, counts_B: Tensor | None = None) -> tuple[Tensor, State]:
        raise ValueError(f"{type(self).__name__} is not causal: it has no streaming form; call it on whole sequences")

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """`tokens` of `context` tokens ask for outputs; those that are read pass W_K and W_V, state there is none."""
        read = max(context - self.config.num_queries, 0)
        width = self.output.in_features
        maps = 4 * batch * width * self.config.model_dim * (tokens + read)
        head_dim = width // self.config.num_heads
        pairs = tokens * read if self.weighting == "softmax" else (tokens + read) * head_dim
        products = 2 if self.weighting == "softmax" else 1
        parameters = sum(p.numel() for p in self.parameters())
        width_bytes = dtype_bytes(self.output.weight.dtype)
        moved = parameters + batch * self.config.model_dim * (context + tokens)
        return Cost(
            flops=maps + 2 * products * batch * pairs * width,
            bytes_moved=width_bytes * moved,
            parameters=parameters,
        )

    def reset_parameters(self, std: float, output_std: float) -> None:
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.normal_(layer.weight, std=output_std if layer is self.output else std)

    def query_key(self) -> Tensor:
        """W_QK = W_Q^T W_K of each head, [N, D, D]: scores are e_t W_QK e_j."""
        q_NHD, k_NHD = (m.weight.unflatten(0, (self.config.num_heads, -1)) for m in (self.query, self.key))
        return q_NHD.mT @ k_NHD

    def value_output(self) -> Tensor:
        """W_VP = W_V^T P^T of each head, [N, D, D]: rows of values as they are added, e_j W_VP."""
        v_NHD = self.value.weight.unflatten(0, (self.config.num_heads, -1))
        p_NHD = self.output.weight.T.unflatten(0, (self.config.num_heads, -1))
        return v_NHD.mT @ p_NHD

    @torch.no_grad()
    def set_products(self, query_key_NDD: Tensor, value_output_NDD: Tensor) -> None:
        """Weights with the given products: W_Q = W_QK^T, W_K = I; W_V = W_VP^T, P = I.

        Raises ValueError unless head_dim is model_dim and the shapes are [num_heads, model_dim, model_dim].
        """
        dim, heads = self.config.model_dim, self.config.num_heads
        shape = (heads, dim, dim)
        if self.output.in_features != heads * dim or query_key_NDD.shape != shape or value_output_NDD.shape != shape:
            raise ValueError(
                f"products of shape {tuple(query_key_NDD.shape)} and {tuple(value_output_NDD.shape)} for "
                f"head_dim={self.config.head_dim}: they must be {shape}, with head_dim=None"
            )
        eye_DD = torch.eye(dim, dtype=self.output.weight.dtype)
        self.query.weight.copy_(query_key_NDD.mT.reshape(-1, dim))
        self.key.weight.copy_(eye_DD.repeat(heads, 1))
        self.value.weight.copy_(value_output_NDD.mT.reshape(-1, dim))
        self.output.weight.copy_(eye_DD.repeat(1, heads))
