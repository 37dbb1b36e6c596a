"""A bias by distance, however far: ALiBi, T5's buckets, KERPLE's kernels. A subclass writes `bias` and nothing else."""

from abc import abstractmethod

import torch
from torch import Tensor

from attnzoo.attention.parts.position import QKV, Position
from attnzoo.attention.parts.projection import Heads
from attnzoo.ops.biased_sdpa import biased_sdpa
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import PairBias
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.torch import streamed_bias
from attnzoo.types import accumulation_dtype


class DistanceBias(Position):
    """q_i . k_j / sqrt(H) + bias(i - j): the bias is added after the scale, and has no largest distance.

    A subclass whose bias is meant for keys after the query as well, i - j < 0, says `ahead = True`; without it masks
    that show such keys are refused.
    """

    kind = "bias"
    ahead = False

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    @abstractmethod
    def bias(self, distance_P: Tensor) -> Tensor:
        """bias_NP of the distances i - j, which come as floating point numbers of at least 32 bits (a parameter in half
        precision times them is exact enough). With `ahead` they may be negative, for keys after the query."""

    def attend(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        q_BNTH = qkv[0]
        behind, ahead = mask.reach(q_BNTH.shape[2], qkv[1].shape[2])
        ahead = max(ahead, int(mask.ahead))  # a mask that may show keys ahead asks for a row, be there a key or not
        bias_NP = self._bias((behind, ahead), q_BNTH.device, q_BNTH.dtype)
        return biased_sdpa(*qkv, bias_NP=bias_NP, future_rows=ahead, mask=mask, impl=impl)

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        tokens, head_dim = q_BNTH.shape[2:]
        reach = mask.reach(tokens, tokens)
        bias_NP = self._bias(reach, q_BNTH.device, q_BNTH.dtype)
        positions = mask.positions(tokens, tokens, q_BNTH.device)
        tables = Tables.of_bias(bias_NP, head_dim, head_dim**-0.5, reach[1])
        return q_BNTH, streamed_bias(q_BNTH, tables, positions, head_dim**-0.5)

    def tables(self, mask: Mask, tokens: int) -> Tables | PairBias | None:
        device = torch.device("cpu") if mask.query_positions_BT is None else mask.query_positions_BT.device
        kept = (x.dtype for x in (*self.parameters(), *self.buffers()) if x.is_floating_point())
        reach = mask.reach(tokens, tokens)
        bias_NP = self._bias(reach, device, next(kept, torch.float32))
        return Tables.of_bias(bias_NP, self.heads.head_dim, self.heads.head_dim**-0.5, reach[1])

    def _bias(self, reach: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """bias_NP of every distance of `Mask.reach`. Raises ValueError for a subclass's result of another shape:
        broadcasting would hide it."""
        dtype = accumulation_dtype(dtype)
        behind, ahead = reach
        distance_P = torch.arange(-ahead, behind + 1, device=device, dtype=dtype)
        bias_NP = self.bias(distance_P)
        expected = (self.heads.num_heads, len(distance_P))
        if bias_NP.shape != expected:
            raise ValueError(
                f"{type(self).__name__}.bias returned shape {tuple(bias_NP.shape)} for {len(distance_P)} distances; it "
                f"must be [num_heads, distances] = {list(expected)}"
            )
        return bias_NP.to(dtype)
