"""The contract every cache policy keeps.

A policy decides which keys and values of the past stay, where, and in what form. Attention asks it for one
thing: append the new ones and return what to attend to, with the logical position of every entry. Positions
are logical (the index of the token in its sequence) and survive eviction, so that rotary and relative terms
stay right when entries are dropped or moved.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache.state import State

EMPTY = -1
"""Logical position of a cache entry that holds nothing."""


@dataclass(frozen=True)
class CacheView:
    """What to attend to.

    keys_BKSH, values_BKSH; positions_BKS: int64 logical positions, `EMPTY` where an entry holds nothing; its
    K axis is 1 when all kv heads keep the same entries. alone: the entries are the new tokens of every row, in order
    and without padding, so that causality is all there is to a mask of positions.
    """

    keys_BKSH: Tensor
    values_BKSH: Tensor
    positions_BKS: Tensor
    alone: bool = False


class CachePolicy(ABC):
    """One way to keep keys and values."""

    @abstractmethod
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
        """An empty cache with room for `capacity` tokens a sequence."""

    @abstractmethod
    def append(
        self,
        state: Any,
        keys_BKTH: Tensor,
        values_BKTH: Tensor,
        positions_BT: Tensor,
        counts_B: Tensor | None,
    ) -> tuple[State, CacheView]:
        """Adds the first `counts_B[b]` (None: all) new entries of each row and returns what to attend to.

        `positions_BT` are the logical positions of the new entries.
        """

    @abstractmethod
    def nbytes(self, batch: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes that `init` allocates, to the byte."""
