"""How large scores and weights may become: numbers that overflow are refused before anything is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnzoo.attention.edits.items import (
    Add,
    CopyHead,
    Edit,
    Item,
    PutScores,
    PutWeights,
    Scale,
    ScoreEdit,
    Temper,
    Values,
)
from attnzoo.attention.edits.reads import Map
from attnzoo.attention.edits.traits import LayerSizes

SCORES = 1e6
"""Room that is left for the size of the model's own scores and values."""
ROUNDING = 1e-2
"""What an addend may take of a score's digits: more, and the order of computation shows in what comes of it."""


def check_numbers(named: Sequence[tuple[str, Any]], size: LayerSizes, layer: int) -> None:
    """Raises ValueError for numbers whose products with scores and weights are infinite in the dtype that the layer
    computes them in, alone or together: what comes of them is NaN, and nothing would say why; and for maps in a dtype
    that does not hold them. named: the `Meant` items of one layer and their names in JSON."""
    finite = torch.finfo(size.scores_in).max
    scores, weights = (dict.fromkeys(range(size.num_heads), 1.0) for _ in range(2))
    for name, meant in named:
        at, edit = f"edits[{meant.index}].{name}", meant.item
        if not isinstance(edit, Edit):
            continue
        where = f"layer {layer}, whose scores are {str(size.scores_in)[6:]}"
        _check_alone(edit, finite**0.5, where, at)
        if isinstance(edit, Add):
            _check_digits(edit, ROUNDING / torch.finfo(size.scores_in).eps, where, at)
        most = scores if isinstance(edit, ScoreEdit) else weights
        most |= {head: grown(edit, most, head) for head in meant.heads}
        largest = max(most.values())
        held = finite / SCORES
        if not isinstance(edit, ScoreEdit):
            held = min(held, _room(size.outputs_in))
        if largest > held:
            raise ValueError(
                f"{at} makes with the edits before it numbers of up to {largest:.1g} in layer {layer}, which overflow; "
                f"give smaller ones{_wider(size.outputs_in)}"
            )
    for name, meant in named:
        largest = max(weights[head] for head in meant.heads)
        read = meant.item
        half = isinstance(read, Map) and read.kept_in == torch.float16
        if half and not size.editing.bounded:
            raise ValueError(
                f"edits[{meant.index}].{name}: weights of layer {layer} ({size.variant}) have no bound, as they "
                "are not divided by their sum, and fp16 holds none above 65504; give dtype='fp32'"
            )
        if half and largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"edits[{meant.index}].{name}: weights of up to {largest:.1g} may arise in layer {layer}, and fp16 "
                "holds none above 65504; give dtype='fp32'"
            )


def _room(dtype: torch.dtype) -> float:
    """The largest weights that leave room for values in outputs of this dtype."""
    finite: float = torch.finfo(dtype).max
    return finite / min(SCORES, finite**0.5)


def _wider(dtype: torch.dtype) -> str:
    return ", renormalise, or compute in bfloat16 or float32" if dtype == torch.float16 else ""


def _check_alone(edit: Edit, most: float, where: str, at: str) -> None:
    for name in edit.factors:
        given = getattr(edit, name)
        value = given.largest if isinstance(given, Values) else given
        if abs(value) > most:
            raise ValueError(
                f"{at}.{name}={value:g} overflows in {where}: give at most {most:.1g} in magnitude, or use Hide to "
                "take all weight from keys"
            )


def _check_digits(edit: Add, most: float, where: str, at: str) -> None:
    if abs(edit.value) > most:
        raise ValueError(
            f"{at}.value={edit.value:g} leaves no digits of scores in {where}: give at most {0.95 * most:.1g} in "
            "magnitude, or use Hide to take all weight from keys, or from all others, Hide(Where(keys=Except(...)))"
        )


def grown(edit: Item, most: Mapping[int, float], head: int) -> float:
    """The largest magnitude of a head's scores, or sum of a row of its weights, after an edit, if they were at most
    `most` before it, scores of the model being at most 1."""
    before = most[head]
    match edit:
        case Add():
            return before + abs(edit.value)
        case Temper():
            return before * (1 + abs(edit.factor - 1))
        case PutScores():
            return max(before, edit.scores.largest)
        case Scale() if not edit.renormalise:
            return before * max(1.0, edit.factor)
        case PutWeights() if not edit.renormalise:
            return before + float(edit.weights.values.sum(-1).max())
        case CopyHead():
            return before + most[edit.source]
    return before
