"""Random channels: the control for every choice of channels, stored as ThinK stores them.

A channel's lot depends on the seed and the kv head alone, so that runs repeat in every batch.
"""

from dataclasses import dataclass

from torch import Tensor

from attnzoo.kvcache.base import CACHES
from attnzoo.kvcache.channels import hashed_heads
from attnzoo.kvcache.options import ChannelOptions, Prefill, check_least, check_seed
from attnzoo.kvcache.think import ThinKCache


@dataclass(frozen=True, kw_only=True)
class RandomChannelsConfig(ChannelOptions):
    """`seed`: of the lots."""

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
    """Channels by lot."""

    source = "control"
    Config = RandomChannelsConfig
    observes = False

    def scores(self, queries_BNWH: Tensor | None, keys_BKSH: Tensor, held_BKS: Tensor, before_BKH: Tensor) -> Tensor:
        batch, kv_heads, _, head_dim = keys_BKSH.shape
        return hashed_heads(kv_heads, head_dim, self.config.seed, keys_BKSH.device).expand(batch, -1, -1)
