"""Random tokens: the control experiment for policies that choose tokens. Sinks and the most recent tokens stay as in
D2O; the others are chosen at random.

A token's random number depends on the seed, its position and the kv head alone, so that a sequence keeps the same
tokens in every run, in any batch and in chunks of any length.
"""

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

    def priorities(self, taken_BKS: Tensor, accumulated_BKS: Tensor | None, kv_heads: int) -> Tensor:
        heads_K1 = torch.arange(kv_heads, device=taken_BKS.device)[:, None]
        return hashed((taken_BKS - 1) * 1021 + heads_K1, self.config.seed)
