"""A score bias given as a function of positions and head: ALiBi, T5's buckets, distance windows, in one line."""

import inspect

import torch
from torch import Tensor, nn

from attnzoo.attention.parts.distance_bias import DistanceBias
from attnzoo.attention.parts.position import QKV
from attnzoo.attention.parts.projection import Heads
from attnzoo.derived_memory import without_values
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.pair_bias import BiasFunction, PairBias, checked_bias
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.pairwise_sdpa import pairwise_sdpa

SAMPLES = (0, 1, 2, 3, 5, 7, 8, 15, 16, 31, 64, 127, 128, 1000, 4095)
"""Distances at which a bias is asked whether it depends on distance alone."""
SHIFTS = (1, 13, 512)
"""How far both positions are moved then."""
FIRST = 4
"""Among so many first positions, every pair's bias is looked at when a layer is built."""


class ScoreBias(DistanceBias):
    """q_i . k_j / sqrt(H) + function(i, j, head): `ScoreBias(heads, lambda i, j, head: (j - i) / 2 ** (head + 1))`.

    function: given the positions of query and key and the query head, counted from 0, as int64 tensors that broadcast
    against each other; returns floating point numbers, -inf where the head must not see the key (put in last: what is
    multiplied by infinity has no gradient). What makes numbers of them makes float32, torch's default, whatever the
    layer's dtype. One that learns is an nn.Module with `forward(i,
    j, head)`, and its parameters are the layer's.

    ahead=True: it is meant for keys after the query, j > i, too; without it masks that show such keys are refused.

    Parallel, streamed and with every cache policy. Memory is that of the pairs of 128 queries, all keys and all heads,
    forward and backward; there are no GPU kernels, so torch computes it on a GPU too. by_distance=True: the function
    depends on i - j alone and hides nothing; then memory is that of the distances, and kernels compute it. Raises
    ValueError where samples show that it does not, for a bias that is no number or infinite, and for a plain function
    that uses parameters, which no optimizer and no checkpoint would find.
    """

    def __init__(self, heads: Heads, function: BiasFunction, *, by_distance: bool = False, ahead: bool = False) -> None:
        super().__init__(heads)
        _refuse_hidden_parameters(function)
        self.function, self.by_distance, self.ahead = function, by_distance, ahead
        self.shift_invariant = by_distance
        self._check_first()
        if by_distance:
            self._check_samples()
        else:
            self.implementations = ("reference", "torch")

    @property
    def _pairs(self) -> PairBias:
        return PairBias(self.function, self.heads.num_heads)

    def bias(self, distance_P: Tensor) -> Tensor:
        """Of the path by distance."""
        bias_NP = self._at(distance_P.long())
        looking = bias_NP.device.type == "cpu" and not without_values() and not torch.compiler.is_compiling()
        if looking and not bool(torch.isfinite(bias_NP).all()):
            where = int(distance_P[(~torch.isfinite(bias_NP)).any(0)][0])
            raise ValueError(
                f"ScoreBias with by_distance=True: the bias is not finite at a distance of {where}; hide keys by the "
                "window of SoftmaxMixing, or leave by_distance out"
            )
        return bias_NP

    def _at(self, distance_P: Tensor, shift: int = 0) -> Tensor:
        """bias_NP of distances between positions that are moved by `shift`."""
        i, j = distance_P.clamp(min=0) + shift, (-distance_P).clamp(min=0) + shift
        heads = self.heads.num_heads
        head_N1 = torch.arange(heads, device=distance_P.device)[:, None]
        bias = checked_bias(self.function(i[None], j[None], head_N1), (heads, len(distance_P)), self.function)
        return bias.to(torch.promote_types(bias.dtype, torch.float32)).expand(heads, -1)

    @torch.no_grad()
    def _check_first(self) -> None:
        """Raises ValueError for a function that cannot be called, and for a bias that no softmax can take: of pairs of
        the FIRST positions, those of later keys only where it is meant for them."""
        called = self.function.forward if isinstance(self.function, nn.Module) else self.function
        try:
            inspect.signature(called).bind(None, None, None)
        except TypeError as error:
            raise ValueError(f"ScoreBias: the function must take i, j and head ({error})") from None
        like = next(self.parameters(), torch.empty(0))
        if like.is_meta:  # a model that is only sized, or is built to be loaded
            return
        index_T, mask = torch.arange(FIRST, device=like.device), Mask.full() if self.ahead else Mask()
        bias_BNTS = self._pairs.of(index_T[None], index_T[None, None], mask, like.dtype)
        for _, head, query, key in (bias_BNTS.isnan() | (bias_BNTS == float("inf"))).nonzero().tolist():
            raise ValueError(
                f"ScoreBias: the bias of query {query}, key {key} and head {head} is "
                f"{float(bias_BNTS[0, head, query, key])}; it must be a number, or -inf where a key is hidden"
            )

    @torch.no_grad()
    def _check_samples(self) -> None:
        known = next(self.parameters(), torch.empty(0))
        if known.is_meta:  # a model that is only sized, or is built to be loaded
            return
        distance_P = torch.tensor(SAMPLES, device=known.device)
        bias_NP = self._at(distance_P)
        for shift in SHIFTS:
            moved_NP = self._at(distance_P, shift)
            if not torch.allclose(bias_NP, moved_NP, rtol=1e-4, atol=1e-6, equal_nan=True):
                at = int(distance_P[(bias_NP - moved_NP).abs().amax(0).argmax()])
                raise ValueError(
                    f"ScoreBias with by_distance=True: the bias of query {at} and key 0 is not that of query "
                    f"{at + shift} and key {shift}; leave by_distance out, or make it a function of i - j and head"
                )
        self.bias(distance_P.to(torch.float32))

    def attend(self, qkv: QKV, mask: Mask, impl: Impl) -> Tensor:
        if self.by_distance:
            return super().attend(qkv, mask, impl)
        return pairwise_sdpa(*qkv, bias=self._pairs, mask=mask, impl=impl)

    def terms(self, q_BNTH: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        if self.by_distance:
            return super().terms(q_BNTH, mask)
        tokens = q_BNTH.shape[2]
        return q_BNTH, self._pairs.of(*mask.positions(tokens, tokens, q_BNTH.device), mask, q_BNTH.dtype)

    def tables(self, mask: Mask, tokens: int) -> Tables | PairBias | None:
        return super().tables(mask, tokens) if self.by_distance else self._pairs


def _refuse_hidden_parameters(function: BiasFunction) -> None:
    """Raises ValueError for a plain function whose closure holds something that could be trained."""
    if isinstance(function, nn.Module) or not inspect.isfunction(function):
        return
    found = inspect.getclosurevars(function)
    for name, value in {**found.nonlocals, **found.globals}.items():
        trained = isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad)
        if trained:
            raise ValueError(
                f"ScoreBias: the function uses {name!r}, whose parameters no optimizer and no checkpoint would find; "
                "make it an nn.Module with forward(i, j, head) that holds them"
            )
