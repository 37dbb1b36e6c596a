"""Base of the variants that read a whole context at once, as the in-context-learning literature defines them.

The last `num_queries` tokens ask and are not read: the others are the context of all tokens. So a token depends on
later ones: such a variant is not causal, has no streaming form and no state, and a decoder language model refuses it.
With no feature map, bias, norm or scale the maps W_V, W_K, W_Q and P are square by default, as in the papers. The
residual is the caller's: e <- e + layer(e).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.attention.base import Cost, Traits
from attnzoo.attention.composed import ParallelComposition
from attnzoo.attention.edits.run import LayerPlan
from attnzoo.attention.parts import Heads, Mixing, Projection
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.types import CheckedConfig, check_cost_sizes, dtype_bytes


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

    @property
    def heads(self) -> Heads:
        return Heads.of(self.model_dim, self.num_heads, None, self.head_dim or self.model_dim)


class InContextAttention(ParallelComposition):
    """y_t = sum_heads P sum_{j: read} W_V e_j weight(W_K e_j, W_Q e_t); subclasses say by which mixing."""

    Config = InContextConfig
    implementations: ClassVar[Sequence[str]] = ("reference", "torch")

    def __init__(self, config: InContextConfig, mixing: Mixing) -> None:
        """mixing: of a kind that takes a context."""
        super().__init__(config, projection=Projection(config.heads), mixing=mixing)

    @property
    def traits(self) -> Traits:
        return Traits(masks=frozenset(), growth="O(1)", streaming="none")

    def _parallel(
        self,
        x_BTD: Tensor,
        context_BSD: Tensor | None,
        mask: Mask | None,
        impl: Impl,
        edits: LayerPlan | None = None,
    ) -> Tensor:
        self.check_input(x_BTD, context_BSD, mask)
        queries, tokens = self.config.num_queries, x_BTD.shape[1]
        if tokens <= queries:
            raise ValueError(f"{tokens} tokens of which the last num_queries={queries} ask leave nothing to read")
        return self._mixed(x_BTD, x_BTD[:, : tokens - queries], Mask.full(), impl, edits)

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """`tokens` of `context` tokens ask for outputs; those that are read pass W_K and W_V, state there is none."""
        check_cost_sizes(batch, tokens, context, continues=False)
        read = max(context - self.config.num_queries, 0)
        width = self.projection.output.in_features
        maps = 4 * batch * width * self.config.model_dim * (tokens + read)
        of_each = self.mixing.traits.growth == "O(T)"  # every query meets every key, or all meet one sum
        pairs = 2 * tokens * read if of_each else (tokens + read) * self.config.heads.head_dim
        parameters = sum(p.numel() for p in self.parameters())
        width_bytes = dtype_bytes(self.projection.output.weight.dtype)
        moved = parameters + batch * self.config.model_dim * (context + tokens)
        return Cost(
            flops=maps + 2 * batch * pairs * width,
            bytes_moved=width_bytes * moved,
            parameters=parameters,
        )

    def query_key(self) -> Tensor:
        """W_QK = W_Q^T W_K of each head, [N, D, D]: scores are e_t W_QK e_j."""
        maps = (self.projection.query, self.projection.key)
        q_NHD, k_NHD = (m.weight.unflatten(0, (self.config.num_heads, -1)) for m in maps)
        return q_NHD.mT @ k_NHD

    def value_output(self) -> Tensor:
        """W_VP = W_V^T P^T of each head, [N, D, D]: rows of values as they are added, e_j W_VP."""
        v_NHD = self.projection.value.weight.unflatten(0, (self.config.num_heads, -1))
        p_NHD = self.projection.output.weight.T.unflatten(0, (self.config.num_heads, -1))
        return v_NHD.mT @ p_NHD

    @torch.no_grad()
    def set_products(self, query_key_NDD: Tensor, value_output_NDD: Tensor) -> None:
        """Weights with the given products: W_Q = W_QK^T, W_K = I; W_V = W_VP^T, P = I.

        Raises ValueError unless head_dim is model_dim and the shapes are [num_heads, model_dim, model_dim].
        """
        dim, heads = self.config.model_dim, self.config.num_heads
        shape = (heads, dim, dim)
        maps = self.projection
        if maps.output.in_features != heads * dim or query_key_NDD.shape != shape or value_output_NDD.shape != shape:
            raise ValueError(
                f"products of shape {tuple(query_key_NDD.shape)} and {tuple(value_output_NDD.shape)} for "
                f"head_dim={self.config.head_dim}: they must be {shape}, with head_dim=None"
            )
        eye_DD = torch.eye(dim, dtype=maps.output.weight.dtype)
        maps.query.weight.copy_(query_key_NDD.mT.reshape(-1, dim))
        maps.key.weight.copy_(eye_DD.repeat(heads, 1))
        maps.value.weight.copy_(value_output_NDD.mT.reshape(-1, dim))
        maps.output.weight.copy_(eye_DD.repeat(1, heads))
