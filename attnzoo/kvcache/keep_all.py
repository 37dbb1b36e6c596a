"""The policy "full": the variant's own exact cache, all tokens or its window. `model.compress` changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CACHES, CachedLayer, CachePolicy, ScoreFunction
from attnzoo.kvcache.full import FullCache
from attnzoo.kvcache.state import State


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """No options."""


@CACHES.register("full")
class KeepAll(CachePolicy):
    """Drops nothing. Attention variants use their own cache in place of this one; the state is the same."""

    source = "exact"
    Config = FullConfig

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    @property
    def prefill(self) -> str:
        return "oneshot"

    def init(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> State:
        return FullCache().init(batch, num_kv_heads, head_dim, capacity, device=device, dtype=dtype)

    def attend(
        self,
        state: Any,
        score_function: ScoreFunction,
        qkv: tuple[Tensor, Tensor, Tensor],
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[Tensor, State]:
        state, view = cc.FULL.append(state, qkv[1], qkv[2], positions_BT, counts_B)
        assert score_function.edits is None, "attention keeps everything by the full cache"
        return score_function.attend(qkv[0], view, positions_BT), state

    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[State]:
        return [layer.state for layer in layers]

    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        return FullCache().nbytes(batch, num_kv_heads, head_dim, capacity, dtype)

    def compressed_nbytes(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        prompt: int,
        dtype: torch.dtype,
        *,
        tokens: int = 0,
        joinable: bool = False,
    ) -> int:
        return self.nbytes(batch, num_kv_heads, head_dim, prompt + tokens, dtype)
