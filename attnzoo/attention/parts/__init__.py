"""The parts variants are made of: projection, token mixing (convolution), position, mixing over time.

Each part owns its parallel form, its streaming form, its reference and its cost.
"""

from attnzoo.attention.parts.convolution import ConvInit, QKVConv, QKVConvState
from attnzoo.attention.parts.distance_bias import DistanceBias
from attnzoo.attention.parts.linear import FeatureMap, LinearMixing
from attnzoo.attention.parts.mesa import MesaMixing
from attnzoo.attention.parts.mixing import ContextState, Mixing, SoftmaxMixing
from attnzoo.attention.parts.position import QKV, NoPosition, Position, RelativeSinusoid, RelativeTable, Rope, Unscaled
from attnzoo.attention.parts.projection import Heads, PairedProjection, Projection
from attnzoo.attention.parts.score_bias import ScoreBias

__all__ = [
    "QKV",
    "ContextState",
    "ConvInit",
    "DistanceBias",
    "FeatureMap",
    "Heads",
    "LinearMixing",
    "MesaMixing",
    "Mixing",
    "NoPosition",
    "PairedProjection",
    "Position",
    "Projection",
    "QKVConv",
    "QKVConvState",
    "RelativeSinusoid",
    "RelativeTable",
    "Rope",
    "ScoreBias",
    "SoftmaxMixing",
    "Unscaled",
]
