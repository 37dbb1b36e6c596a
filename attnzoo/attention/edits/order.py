"""The order of things, written once: scores, score edits in list order, softmax, weight edits in list order.

Values come after. Keys may be single keys, or classes of keys: the score of a class is the logarithm of the sum of the
exponentials of its keys' scores, and its weight the sum of theirs, so that all that follows is the same. Where every
key has a score and edits speak of classes, what they do to a class is done to each of its keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits.classes import MovedParts, of_classes
from attnzoo.attention.edits.items import Here, ScoreEdit, WeightEdit

NARROW = 16
_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


@dataclass(frozen=True)
class Weighed:
    """scores_NRS after score edits, -inf for what is hidden; weights_NRS after weight edits; empty_NR1: rows in which
    nothing can be seen, whose weights are 0."""

    scores_NRS: Tensor
    weights_NRS: Tensor
    empty_NR1: Tensor


@dataclass(frozen=True)
class WeighedByClass:
    """weights_BNRS of keys and their sums_BNRC before weight edits; after_BNRC: the sums after them. empty_BNR1: rows
    in which nothing can be seen; None: there are none. several: weight edits, whose factors together may overflow."""

    weights_BNRS: Tensor
    sums_BNRC: Tensor
    after_BNRC: Tensor
    empty_BNR1: Tensor | None
    several: bool

    def edited_(self, table_LCS: Tensor) -> Tensor:
        """The weights of keys after weight edits, in place: each keeps its share of its class."""
        if self.after_BNRC is self.sums_BNRC and self.empty_BNR1 is None:
            return self.weights_BNRS
        least_BNRC = self.sums_BNRC.clamp(min=_TINY[self.sums_BNRC.dtype])  # of a class with any weight
        if not self.several:
            return self.weights_BNRS.mul_(of_classes(self.after_BNRC / least_BNRC, table_LCS))
        shares_BNRS = self.weights_BNRS.div_(of_classes(least_BNRC, table_LCS))
        return shares_BNRS.mul_(of_classes(self.after_BNRC, table_LCS))


def weighed(scores_NRS: Tensor, visible_NRS: Tensor, items: Sequence[tuple[Any, Here]]) -> Weighed:
    """Softmax attention weights with edits; other items are left out. What is not visible has no weight, whatever edits
    say."""
    hidden = ~visible_NRS
    if any(isinstance(item, ScoreEdit) for item, _ in items):
        scores_NRS = scored(scores_NRS.masked_fill(hidden, 0.0), items)
    scores = scores_NRS.masked_fill(hidden, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = _over_keys(scores.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
    return Weighed(scores, changed(weights, hidden, items), empty)


def _over_keys(scores_NRS: Tensor) -> Tensor:
    """The softmax. Over a few classes it is computed in memory where rows follow each other: torch takes 20 times as
    long where the numbers of a row do."""
    if scores_NRS.shape[-1] > NARROW:
        return scores_NRS.softmax(-1)
    return scores_NRS.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


def weighed_by_class(
    scores_BNRS: Tensor, empty_BNR1: Tensor | None, table_LCS: Tensor, items: Sequence[tuple[Any, Here]]
) -> WeighedByClass:
    """Softmax attention weights with edits of classes, without gradients. Scores are -inf where hidden; empty_BNR1:
    rows in which nothing can be seen, whose scores may be anything, None: there are none."""
    hidden = empty_BNR1
    if any(isinstance(item, ScoreEdit) for item, _ in items):
        added_BNRC = scored(scores_BNRS.new_zeros(*scores_BNRS.shape[:3], table_LCS.shape[1]), items)
        hidden = added_BNRC == float("-inf") if hidden is None else hidden | (added_BNRC == float("-inf"))
        lowest = torch.finfo(added_BNRC.dtype).min / 2  # in place of -inf, which has no product with 0
        scores_BNRS = scores_BNRS + of_classes(added_BNRC.clamp(min=lowest), table_LCS)
    weights_BNRS = _softmax(scores_BNRS)
    sums_BNRC = of_classes(weights_BNRS, table_LCS.mT)
    empty = None
    if hidden is not None:
        sums_BNRC = sums_BNRC.masked_fill(hidden, 0.0)
        empty = (sums_BNRC == 0).all(-1, keepdim=True)
    several = sum(isinstance(item, WeightEdit) for item, _ in items) > 1
    return WeighedByClass(weights_BNRS, sums_BNRC, changed(sums_BNRC, None, items), empty, several)


def moved_weights(scores_BNRS: Tensor, parts: MovedParts, table_LCS: Tensor) -> Tensor:
    """Softmax attention weights after a move between sets of keys, the only edit, where no row is empty and without
    gradients. table_LCS: that of `parts` for every key of each row. Heads and queries that the edit does not name have
    its weights, too."""
    weights_BNRS = _softmax(scores_BNRS)
    weights_LRS = weights_BNRS.view(table_LCS.shape[0], -1, scores_BNRS.shape[3])
    factors_LR2 = parts.factors(torch.bmm(weights_LRS, table_LCS.mT), None, whole=True)
    weights_LRS.addcmul_(weights_LRS, torch.bmm(factors_LR2, parts.back(table_LCS)))
    return weights_BNRS


def _softmax(scores_BNRS: Tensor) -> Tensor:
    weights_BNRS = torch.softmax(scores_BNRS, -1)
    if weights_BNRS.is_cpu:
        torch.threshold_(weights_BNRS, _TINY[weights_BNRS.dtype], 0.0)  # denormal numbers are slow
    return weights_BNRS


def scored(scores_NRS: Tensor, items: Sequence[tuple[Any, Here]]) -> Tensor:
    """Scores after the score edits."""
    for item, here in items:
        if isinstance(item, ScoreEdit):
            scores_NRS = item.apply(scores_NRS, here)
    return scores_NRS


def changed(weights_NRS: Tensor, hidden_NRS: Tensor | None, items: Sequence[tuple[Any, Here]]) -> Tensor:
    """Weights after the weight edits, 0 where hidden."""
    for item, here in items:
        if isinstance(item, WeightEdit):
            weights_NRS = item.apply(weights_NRS, here)
            if hidden_NRS is not None:
                weights_NRS = weights_NRS.masked_fill(hidden_NRS, 0.0)
    return weights_NRS
