"""Linear self-attention: a matrix that sums outer products of keys and values, read by each query.

Source: Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236), eq. 16-20; decay per head as in
RetNet, Sun et al. 2023 (arXiv 2307.08621), eq. 6.

    S_t = gamma S_{t-1} + phi(k_t) v_t^T,   o_t = phi(q_t) . S_t  [ / (phi(q_t) . z_t),  z_t the same sum of phi(k_t) ]

Differs from the paper: gamma is learned, and absent with decay=False; the normaliser is on only where asked for
(normalise=True needs the positive map elu + 1). feature_map="identity" without normaliser and decay is the linear
self-attention that the in-context-learning literature analyses.
"""

from dataclasses import dataclass

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.parts import FeatureMap, Heads, LinearMixing, Projection
from attnzoo.types import CheckedConfig


@dataclass(frozen=True, kw_only=True)
class LinearConfig(CheckedConfig):
    """`feature_map`: phi; `normalise`: divide by the sum of weights; `decay`: one learned rate a kv head."""

    model_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    feature_map: FeatureMap = "elu1"
    normalise: bool = True
    decay: bool = True


@ATTENTION.register("linear")
class Linear(ComposedAttention):
    """Attention without softmax: state of constant size."""

    source = "Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16-20"
    Config = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        heads = Heads.of(config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        super().__init__(
            config,
            projection=Projection(heads),
            mixing=LinearMixing(
                heads,
                feature_map=config.feature_map,
                normalise=config.normalise,
                decay=config.decay,
            ),
        )
