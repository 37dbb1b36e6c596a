"""Random tokens: the control experiment for policies that choose tokens. Sinks and the most recent tokens stay as in
D2O; the others are chosen at random.

A token's random number depends on the seed, its position and the kv head alone, so that a sequence keeps the same
tokens in every run, in any batch and in chunks of any length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kvcache.base import CACHES
from attnzoo.kvcache.channels import hashed
from attnzoo.kvcache.eviction import EvictingCache
from attnzoo.kvcache.options import TokenOptions, check_seed


@dataclass(frozen=True, kw_only=True)
class RandomTokensConfig(TokenOptions):
    """seed: seed of the random choice."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)


@CACHES.register("random_tokens")
class RandomTokensCache(EvictingCache):
    """Evicts the token with the lowest random number."""

    source = "control"
    Config = RandomTokensConfig

    def priorities(self, positions_BKS: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        heads_K1 = torch.arange(positions_BKS.shape[1], device=positions_BKS.device)[:, None]
        return hashed(positions_BKS * 1021 + heads_K1, self.config.seed)
