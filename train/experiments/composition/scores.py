"""All metrics of composed pictures at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.experiments.composition import metrics
from train.experiments.composition.cases import CompositionCase
from train.experiments.composition.crops import cut
from train.experiments.composition.reader import Reader, read

BACKGROUND, OBJECT, RANK, STYLE, PALETTE, SEAM, LEAK = (
    "background error",
    "object distance",
    "identity rank",
    "style fit",
    "palette distance",
    "seam",
    "leakage",
)
METRICS = (BACKGROUND, OBJECT, RANK, STYLE, PALETTE, SEAM, LEAK)
MORE_IS_BETTER = (STYLE,)
"""Of the others less is better."""


@dataclass(frozen=True)
class Readers:
    """whole: of whole pictures; square: of squares around objects. styles: by the numbers that they tell."""

    whole: Reader
    square: Reader
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What the pictures of cases are compared with."""

    kinds_N: np.ndarray
    style_N: np.ndarray
    squares_N3: np.ndarray
    regions: np.ndarray
    boxes: np.ndarray
    backgrounds: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, cases: Sequence[CompositionCase], styles: Sequence[str]) -> "Wanted":
        """The parts of all cases as arrays."""
        return cls(
            np.array([case.kind for case in cases]),
            np.array([styles.index(case.style) for case in cases]),
            np.array([case.square for case in cases]),
            np.stack([case.placement.region() for case in cases]),
            np.stack([case.box() for case in cases]),
            np.stack([case.placement.background for case in cases]),
            np.stack([case.answer for case in cases]),
        )


def scores(readers: Readers, cases: Sequence[CompositionCase], images: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of every picture, float64 [N]."""
    wanted = Wanted.of(cases, readers.styles)
    squares, right = (cut(x, wanted.squares_N3) for x in (images, wanted.answers))
    told = read(readers.square, squares)
    rest = read(readers.whole, metrics.without_object(images, wanted.backgrounds, wanted.boxes))
    return {
        BACKGROUND: metrics.background_error(images, wanted.backgrounds, wanted.boxes),
        OBJECT: metrics.feature_distance(readers.square, squares, right),
        RANK: metrics.rank(told, wanted.kinds_N),
        STYLE: metrics.style_fit(told, wanted.style_N),
        PALETTE: metrics.palette_distance(images, wanted.answers, wanted.regions),
        SEAM: metrics.seam(images, wanted.answers, wanted.regions),
        LEAK: metrics.leakage(rest, wanted.kinds_N),
    }
