"""Whether the metrics can be trusted: pictures known to be good or bad, which each metric must order rightly."""

from collections.abc import Sequence

import numpy as np

from attnzoo.clinical.metrics import auroc
from attnzoo.vision import STYLES
from train.experiments.composition.cases import CompositionCase
from train.experiments.composition.metrics import ring
from train.experiments.composition.scores import (
    BACKGROUND,
    LEAK,
    MORE_IS_BETTER,
    OBJECT,
    PALETTE,
    RANK,
    SEAM,
    STYLE,
    Readers,
    scores,
)

NOISY, SHIFTED, BLURRED, RECOLOURED, WRONG = "noisy", "1-px shift", "blur", "recolour", "wrong object"
OTHER_STYLE, FRAMED, TINTED, LEAKED = "other style", "frame", "tinted background", "second copy"
NOISE, TINT = 3.0, 6
"""Standard deviation of the noise of good pictures, and what is added to bad backgrounds, in 8-bit levels."""
PAIRS = (
    (OBJECT, NOISY, SHIFTED),
    (OBJECT, NOISY, BLURRED),
    (OBJECT, SHIFTED, RECOLOURED),
    (OBJECT, BLURRED, RECOLOURED),
    (OBJECT, SHIFTED, WRONG),
    (OBJECT, BLURRED, WRONG),
    (RANK, NOISY, WRONG),
    (RANK, SHIFTED, WRONG),
    (RANK, OTHER_STYLE, WRONG),
    (STYLE, NOISY, OTHER_STYLE),
    (STYLE, SHIFTED, OTHER_STYLE),
    (PALETTE, NOISY, RECOLOURED),
    (PALETTE, SHIFTED, OTHER_STYLE),
    (SEAM, NOISY, FRAMED),
    (SEAM, NOISY, BLURRED),
    (BACKGROUND, NOISY, TINTED),
    (LEAK, NOISY, LEAKED),
)
"""(metric, better, worse)."""
UNORDERED = ((OBJECT, SHIFTED, BLURRED), (OBJECT, RECOLOURED, WRONG))
"""Pairs that are told without being judged: to a distance of pictures of some 14 pixels, one pixel is as far as a blur,
and a negative as far as another object."""


def known_pictures(cases: Sequence[CompositionCase], seed: int) -> dict[str, np.ndarray]:
    """Pictures of each case by what is wrong with them, uint8 [N, H, W, 3]."""
    random = np.random.default_rng((seed, 4))
    answers = np.stack([case.answer for case in cases])
    regions = np.stack([case.placement.region() for case in cases])
    boxes = np.stack([case.box() for case in cases])
    noise = np.stack([random.normal(0, NOISE, x.shape) for x in answers])
    lines = ring(regions, 1) & regions
    return {
        NOISY: _levels(answers + noise),
        SHIFTED: np.stack([case.moved(*_inwards(case)) for case in cases]),
        BLURRED: np.where(boxes[..., None], _blurred(answers), answers),
        RECOLOURED: np.where(regions[..., None], 255 - answers[..., [1, 2, 0]], answers),
        WRONG: np.stack([case.wrong for case in cases]),
        OTHER_STYLE: np.where(regions[..., None], np.stack([_restyled(case) for case in cases]), answers),
        FRAMED: np.where(lines[..., None], np.where(answers > 127, 0, 255), answers).astype(np.uint8),
        TINTED: np.where(boxes[..., None], answers, _levels(answers.astype(float) + TINT)),
        LEAKED: np.where(boxes[..., None], answers, np.stack([_elsewhere(case) for case in cases])),
    }


def pair_table(readers: Readers, cases: Sequence[CompositionCase], seed: int) -> list[dict[str, object]]:
    """For each of `PAIRS`, then of `UNORDERED`, how often the metric takes the better of two pictures for the better
    one (area under the ROC curve)."""
    known = {name: scores(readers, cases, images) for name, images in known_pictures(cases, seed).items()}
    rows: list[dict[str, object]] = []
    for metric, better, worse in (*PAIRS, *UNORDERED):
        values = np.concatenate([known[better][metric], known[worse][metric]])
        bad = np.repeat([0, 1], len(cases))
        sign = -1 if metric in MORE_IS_BETTER else 1
        rows.append({"metric": metric, "better": better, "worse": worse, "AUC": float(auroc(bad, sign * values))})
    return rows


def _inwards(case: CompositionCase) -> tuple[int, int]:
    """A step to the right or to the left, whichever is away from the nearer border."""
    left, _, side = case.square
    return (1 if left + side / 2 < case.answer.shape[1] / 2 else -1), 0


def _blurred(images: np.ndarray) -> np.ndarray:
    """Weights 1, 2, 1 along both sides, twice; the border is repeated."""
    x = images.astype(np.float64)
    for axis in (1, 2, 1, 2):
        width = [(0, 0)] * x.ndim
        width[axis] = (1, 1)
        padded, length = np.pad(x, width, mode="edge"), x.shape[axis]
        before, same, after = (np.take(padded, np.arange(at, at + length), axis) for at in range(3))
        x = (before + 2 * same + after) / 4
    return _levels(x)


def _restyled(case: CompositionCase) -> np.ndarray:
    """The whole picture in the next style."""
    names = list(STYLES)
    other = names[(names.index(case.style) + 1) % len(names)]
    return STYLES[other](case.unstyled())


def _elsewhere(case: CompositionCase) -> np.ndarray:
    """The picture with its object in the corner that is farthest from it."""
    left, top, side = case.square
    end = len(case.answer) - side
    right, down = ((end if at + side / 2 < len(case.answer) / 2 else 0) - at for at in (left, top))
    return case.moved(right, down)


def _levels(images: np.ndarray) -> np.ndarray:
    return images.round().clip(0, 255).astype(np.uint8)
