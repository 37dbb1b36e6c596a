"""The arms of experiment V: what is done to attention while a model answers questions about pictures."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from attnzoo.attention.edits import After, Hide, Item, Move, Where
from attnzoo.vision.redistribution import FoundSinks, redistribution

UNEDITED = "unedited"
VAR = "redistribution"
FIXED = "fixed threshold"
OTHERS_HIDDEN = "as many others hidden"
PUBLISHED_TAU, PUBLISHED_DIM = 20.0, 4096
"""The published threshold, for a model of that width."""

Arm = Callable[[FoundSinks], list[Item]]


def _with(p: float = 0.6, rho: float = 0.8, least: float = 0.2) -> Arm:
    return lambda found: redistribution(found, p=p, rho=rho, least=least)


def _to_words(found: FoundSinks) -> list[Item]:
    """The share goes to the words after the picture, in every head that looks at the picture: words have no part of
    its weight, so that `rho` can say nothing of them."""
    moves = [item for item in redistribution(found, rho=0.0) if isinstance(item, Move)]
    return [replace(item, to=After("image")) for item in moves]


def _first_hidden(found: FoundSinks) -> list[Item]:
    moves = [item for item in redistribution(found) if isinstance(item, Move)]
    return [Hide(replace(item.where, keys=0)) for item in moves]


def _sinks_hidden(found: FoundSinks) -> list[Item]:
    moves = [item for item in redistribution(found) if isinstance(item, Move)]
    return [Hide(item.where) for item in moves]


def others_hidden(counts: Mapping[int, int], places: range, random: np.random.Generator) -> list[Item]:
    """What `_sinks_hidden` is to be compared with: the first token and, in the place of the picture's sinks, as many
    random tokens of the picture. counts: of sinks by layer; places: the picture's."""
    items: list[Item] = []
    for layer, count in counts.items():
        some = sorted(int(at) for at in random.choice(np.array(places), count, replace=False))
        items.append(Hide(Where(layers=layer, queries=After("image"), keys=(0, *some))))
    return items


def fixed(found: FoundSinks, dim: int) -> FoundSinks:
    """The published threshold in every layer, for a model of this width."""
    tau = PUBLISHED_TAU * (dim / PUBLISHED_DIM) ** 0.5
    return replace(found, layers=tuple(replace(layer, tau=tau, reason="") for layer in found.layers))


ARMS: dict[str, Arm] = {
    UNEDITED: lambda found: [],
    VAR: _with(),
    "redistribution, rho 0.5": _with(rho=0.5),
    "redistribution, rho 0.9": _with(rho=0.9),
    "redistribution, p 0.3": _with(p=0.3),
    "redistribution, p 0.9": _with(p=0.9),
    "redistribution in every head": _with(rho=0.0, least=0.0),
    "redistribution to the words": _to_words,
    "sinks hidden": _sinks_hidden,
    "first token hidden": _first_hidden,
}
"""Arms of a model with sinks."""
