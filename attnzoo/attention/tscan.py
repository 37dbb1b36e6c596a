"""Cross attention of TSCAN's fusion encoders: the present chunk of a stay reads what the earlier chunks have become.

Source: "Temporal-spatial Correlation Attention Network for Clinical Data Analysis in Intensive Care Unit" (2023, arXiv
2306.01970), fusion encoder.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   q = x W_q,  k = y W_k
    flavor="paper":     v_s = W_v relu(W [x_s; y_s] + b)     (V = MLP([Q; K]): the MLP's last map is part of W_v)
    flavor="official":  v = y W_v                            (V = K, the authors' code)

x: the chunk after its self-attention, token t being an hour (temporal branch) or a variable (spatial branch).
y: the context, the z_{j-1} of the encoder before, with the same tokens; without a context, x itself.

Differs from the paper: it does not say how the vectors of Q and K are put together; they are paired token by token,
which needs chunks of one length, and zeros stand for tokens that one of them lacks. Differs from the code: masks are
true ones, of tokens that exist; the code hides later keys from a query, in both branches: that is a mask of the
caller's (`Mask.full(pairs=...)`). No dropout on weights; biases off unless asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from attnzoo.attention.base import ATTENTION, Cost, Traits
from attnzoo.attention.composed import ParallelComposition
from attnzoo.attention.parts import Heads, NoPosition, PairedProjection, Projection, SoftmaxMixing
from attnzoo.types import CheckedConfig, check_cost_sizes, dtype_bytes


@dataclass(frozen=True, kw_only=True)
class TSCANConfig(CheckedConfig):
    """`flavor`: where values come from, see the head of the file. `value_dim`: width of the hidden layer of the paper's
    values; None: model_dim."""

    model_dim: int
    num_heads: int = 4
    head_dim: int | None = None
    flavor: Literal["paper", "official"] = "paper"
    value_dim: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_dim is None:
            return
        if self.value_dim < 1:
            raise ValueError(f"value_dim={self.value_dim} must be at least 1, or None for model_dim")
        if self.flavor == "official":
            raise ValueError(f"value_dim={self.value_dim} is of flavor='paper'; flavor='official' has no hidden layer")


@ATTENTION.register("tscan")
class TSCAN(ParallelComposition):
    """Cross attention between the chunks of a stay; values of both chunks, or of the earlier one."""

    source = "TSCAN, arXiv 2306.01970, fusion encoder"
    Config = TSCANConfig
    implementations: ClassVar[Sequence[str]] = ("reference", "torch")

    def __init__(self, config: TSCANConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, None, config.head_dim)
        biases = {"qkv_bias": config.qkv_bias, "output_bias": config.output_bias}
        projection: Projection
        if config.flavor == "paper":
            projection = PairedProjection(heads, config.value_dim or config.model_dim, **biases)
        else:
            qkv = dict.fromkeys(("query_bias", "key_bias", "value_bias"), config.qkv_bias)
            projection = Projection(heads, **qkv, output_bias=config.output_bias)
        super().__init__(config, projection=projection, mixing=SoftmaxMixing(heads, NoPosition()))

    @property
    def traits(self) -> Traits:
        return Traits(
            masks=frozenset({"full", "keys", "pairs"}),
            context=True,
            position="paired" if self.config.flavor == "paper" else "none",
            growth="O(1)",
            streaming="none",
        )

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """`tokens` queries read `context` tokens, which pass the maps of keys and values; there is no state."""
        check_cost_sizes(batch, tokens, context, continues=False)
        of_queries = sum(m.weight.numel() for m in (self.projection.query, self.projection.output))
        of_keys = self.projection.flops(1, 1) // 2 - of_queries
        width = self.projection.output.in_features
        parameters = sum(p.numel() for p in self.parameters())
        moved = parameters + batch * self.config.model_dim * (2 * tokens + context)
        return Cost(
            flops=2 * batch * (tokens * of_queries + context * of_keys + 2 * tokens * context * width),
            bytes_moved=dtype_bytes(self.projection.output.weight.dtype) * moved,
            parameters=parameters,
        )
