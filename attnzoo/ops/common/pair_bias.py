"""A bias of pairs of a query and a key, given as a function of their positions and the query head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.ops.common.masks import Mask
from attnzoo.types import accumulation_dtype

BiasFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairBias:
    """`function(i, j, head)` gives the bias of query position i, key position j and query head, all counted from 0. It
    is given int64 tensors that broadcast to [B, N, T, S], and returns floating point numbers that do; -inf hides a
    pair. `heads`: N."""

    function: BiasFunction
    heads: int

    def of(
        self, queries_BT: Tensor, keys_BKS: Tensor, mask: Mask, dtype: torch.dtype, starts_BT: Tensor | None = None
    ) -> Tensor:
        """bias_BNTS in the accumulation dtype; B may be 1. `starts_BT`: where each query's document starts, from where
        its positions are counted.

        Keys after the query are asked for where the mask shows such. Else they, like entries that hold nothing, count
        as keys at positions that exist, so that a logarithm of the distance or an index by it is always defined.
        Raises ValueError for a result of another shape, and for one of truth values or complex numbers.
        """
        i, j = queries_BT[:, None, :, None], _per_head(keys_BKS, self.heads)[:, :, None]
        if starts_BT is not None:
            i, j = i - starts_BT[:, None, :, None], j - starts_BT[:, None, :, None]
        i, j = i.clamp(min=0), j.clamp(min=0)
        head_N11 = torch.arange(self.heads, device=i.device)[:, None, None]
        bias = self.function(i, j if mask.ahead else torch.minimum(i, j), head_N11[None])
        batch = max(len(i), len(j))
        expected = (batch, self.heads, queries_BT.shape[1], keys_BKS.shape[2])
        return checked_bias(bias, expected, self.function).to(accumulation_dtype(dtype)).expand(expected)

    def of_query(self, i: Tensor, j_J: Tensor, head: int) -> Tensor:
        """bias_J of one query and head."""
        of_head = torch.full((1, 1, 1, 1), head, device=j_J.device)
        return self.function(i.view(1, 1, 1, 1), j_J.view(1, 1, 1, -1), of_head).flatten().expand(j_J.shape)


def checked_bias(bias: Tensor, expected: tuple[int, ...], function: object) -> Tensor:
    """The result of a bias function. Raises ValueError unless it is of numbers and broadcasts to `expected`."""
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(bias, Tensor) or bias.dtype == torch.bool or bias.is_complex():
        found = type(bias).__name__
        if isinstance(bias, Tensor):
            found = "complex numbers" if bias.is_complex() else "truth values"
        raise ValueError(
            f"the score bias {name} returned {found}; return a tensor of numbers, -inf where a key is hidden"
        )
    try:
        fits = torch.broadcast_shapes(bias.shape, expected) == expected
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the score bias {name} returned shape {list(bias.shape)}; compute it from i, j and head alone, so that it "
            f"broadcasts to {list(expected)}"
        )
    return bias


def _per_head(keys_BKS: Tensor, heads: int) -> Tensor:
    """Positions for every query head, or one for all."""
    kept = keys_BKS.shape[1]
    return keys_BKS if kept in (1, heads) else keys_BKS.repeat_interleave(heads // kept, dim=1)
