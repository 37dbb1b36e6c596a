"""Sinks and a window: the first tokens and the most recent ones stay.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), section 3.2.

Differs from the paper: positions stay logical, where StreamingLLM counts them within the cache; with prefill="oneshot"
the prompt is read with the full cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnzoo.kvcache.base import CACHES
from attnzoo.kvcache.eviction import EvictingCache
from attnzoo.kvcache.options import TokenOptions


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(TokenOptions):
    """The window has the tokens that the budget leaves beside the sinks."""


@CACHES.register("streaming")
class StreamingCache(EvictingCache):
    """Evicts the oldest token that is not a sink."""

    source = "Xiao et al. 2023, arXiv 2309.17453, section 3.2"
    Config = StreamingConfig

    def priorities(self, positions_BKS: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        return positions_BKS.double()
