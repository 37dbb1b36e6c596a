"""The order of things, written once: scores, score edits in list order, softmax, weight edits in list order.

Values come after. Keys may be single keys, or classes of keys: the score of a class is the logarithm of the sum of the
exponentials of its keys' scores, and its weight the sum of theirs, so that all that follows is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnzoo.attention.edits.items import Here, ScoreEdit, WeightEdit


@dataclass(frozen=True)
class Weighed:
    """scores_NRS after score edits, -inf for what is hidden; weights_NRS after weight edits; empty_NR1: rows in which
    nothing can be seen, whose weights are 0."""

    scores_NRS: Tensor
    weights_NRS: Tensor
    empty_NR1: Tensor


def weighed(scores_NRS: Tensor, visible_NRS: Tensor, items: Sequence[tuple[Any, Here]]) -> Weighed:
    """Softmax attention weights with edits; other items are left out. What is not visible has no weight, whatever edits
    say."""
    hidden = ~visible_NRS
    scores = scores_NRS.masked_fill(hidden, 0.0)
    for item, here in items:
        if isinstance(item, ScoreEdit):
            scores = item.apply(scores, here)
    scores = scores.masked_fill(hidden, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return Weighed(scores, changed(weights, hidden, items), empty)


def changed(weights_NRS: Tensor, hidden_NRS: Tensor, items: Sequence[tuple[Any, Here]]) -> Tensor:
    """Weights after the weight edits, 0 where hidden."""
    for item, here in items:
        if isinstance(item, WeightEdit):
            weights_NRS = item.apply(weights_NRS, here).masked_fill(hidden_NRS, 0.0)
    return weights_NRS
