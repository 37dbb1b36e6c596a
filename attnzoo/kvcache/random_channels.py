"""Random channels, stored as ThinK stores them: the control experiment for policies that choose channels.

The choice depends on the seed and the kv head alone, so that it is reproducible in any batch.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnzoo.kvcache.base import CACHES, CacheSize
from attnzoo.kvcache.channels import hashed_heads
from attnzoo.kvcache.options import ChannelOptions, Prefill, check_least, check_seed
from attnzoo.kvcache.think import PrunedState, ThinKCache


@dataclass(frozen=True, kw_only=True)
class RandomChannelsConfig(ChannelOptions):
    """seed: seed of the random choice."""

    seed: int = 0
    prefill: Prefill = "oneshot"
    repack_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.repack_every is not None:
            check_least("repack_every", self.repack_every, 1)


@CACHES.register("random_channels")
class RandomChannelsCache(ThinKCache):
    """Keeps randomly chosen channels."""

    source = "control"
    Config = RandomChannelsConfig
    observes = False

    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> PrunedState:
        return PrunedState(**self.parts(size, tail, prefix, ended))

    def scores(self, state: Any, keys_BKSH: Tensor, held_BKS: Tensor, before_BKH: Tensor) -> Tensor:
        batch, kv_heads, _, head_dim = keys_BKSH.shape
        return hashed_heads(kv_heads, head_dim, self.config.seed, keys_BKSH.device).expand(batch, -1, -1)
