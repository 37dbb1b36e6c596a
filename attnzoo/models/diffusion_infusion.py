"""Infusion of scores: while two pictures are denoised side by side, one's attention between an object and all else is
that of the other.

Source: PrimeComposer (Wang et al. 2024, arXiv 2403.05053, sections 3.2 and 3.3). Rows come in two halves of equal
length: the picture that is generated, and the composed picture (the background with the object pasted into it). In
every self-attention layer

    S = Q K^T / sqrt(d),   Q of the composed picture, K of the generated one's object
    composed:  softmax(S) V, V of the generated one's object
    generated: scores of its object as keys are S, scores of its object as queries are S^T; then the softmax

written as what it is: attention with a context under a mask, a `Map` of its scores, and two `PutScores`. Where the
object's own places meet, S is that of queries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.attention.edits import (
    EditRun,
    Edits,
    Except,
    Map,
    PutScores,
    Span,
    TokenLayout,
    Values,
    Where,
    layer_sizes,
)
from attnzoo.models.blocks import attended
from attnzoo.ops.common.masks import Mask


def places(region_NHW: Tensor, side: int) -> Tensor:
    """region_NT (bool) of a level with `side` places a side: those of which at least half is in the region. A region
    with no such place keeps the one that has most of it; an empty one stays empty."""
    share_NT = F.adaptive_avg_pool2d(region_NHW[:, None].float(), side).flatten(1)
    found_NT = share_NT >= 0.5
    most_NT = F.one_hot(share_NT.argmax(1), side * side).bool() & (share_NT.amax(1) > 0)[:, None]
    return torch.where(found_NT.any(1, keepdim=True), found_NT, most_NT)


def spans_of(region_T: Tensor) -> tuple[Span, ...]:
    """The places of a region as spans of neighbours, in order."""
    numbers = region_T.nonzero()[:, 0].tolist()
    firsts = [number for number in numbers if number == 0 or not region_T[number - 1]]
    lasts = [number for number in numbers if number == len(region_T) - 1 or not region_T[number + 1]]
    return tuple(Span(first, last + 1) for first, last in zip(firsts, lasts, strict=True))


class Infusion:
    """What `DiffusionUNet` does with self-attention for rows [generated, composed]. object_NHW (bool): where the object
    is in each generated picture, in pixels."""

    def __init__(self, object_NHW: Tensor) -> None:
        self.object_NHW = object_NHW
        self._places: dict[int, Tensor] = {}

    def attend(self, attention: Attention, x_MTD: Tensor) -> Tensor:
        """The layer's output [M, T, D] of the normed rows, M = 2 N. Raises ValueError for another number of rows."""
        rows, tokens = len(self.object_NHW), x_MTD.shape[1]
        if len(x_MTD) != 2 * rows:
            raise ValueError(f"{len(x_MTD)} rows are given; infusion of {rows} objects takes {2 * rows}")
        if tokens not in self._places:
            self._places[tokens] = places(self.object_NHW, round(tokens**0.5))
        object_NT = self._places[tokens]
        generated, composed = x_MTD[:rows], x_MTD[rows:]
        chosen = [spans_of(row) for row in object_NT]
        reads = [Edits(Map(Where(keys=keys), what="scores")) if keys else None for keys in chosen]
        mask = Mask.full(object_NT)
        composed, runs = _edited(attention, composed, reads, mask, generated)
        puts = [
            _puts(keys, row, run.reading[0].map) if run is not None else None
            for keys, row, run in zip(chosen, object_NT, runs, strict=True)
        ]
        generated, _ = _edited(attention, generated, puts, Mask.full())
        return torch.cat([generated, composed])


def _puts(keys: tuple[Span, ...], object_T: Tensor, scores_NTS: Tensor) -> Edits:
    """The edits that put S into both directions."""
    others = ~object_T
    found = [PutScores(Where(keys=keys), Values(scores_NTS))]
    if bool(others.any()):
        found.append(PutScores(Where(queries=keys, keys=Except(keys)), Values(scores_NTS[:, others].mT)))
    return Edits(*found)


def _edited(
    attention: Attention,
    x_NTD: Tensor,
    edits: Sequence[Edits | None],
    mask: Mask,
    context_NSD: Tensor | None = None,
) -> tuple[Tensor, list[EditRun | None]]:
    """The layer's output, and the runs with what was read."""
    layout = TokenLayout(x_NTD.shape[1])
    if context_NSD is not None:
        layout = TokenLayout(x_NTD.shape[1], context=TokenLayout(context_NSD.shape[1]))
    sizes = [layer_sizes(attention, context=context_NSD is not None)]
    runs = [None if each is None else EditRun(each.plan(sizes, layout, streams=False)) for each in edits]
    return attended(attention, x_NTD, mask, runs, context_NSD), runs
