"""Squares cut out of pictures."""

import numpy as np

SIDE = 24
"""Pixels of a side of every cut square."""


def cut(images_NHWC: np.ndarray, squares_N3: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 [N, side, side, C]: of each picture the square (left, top, pixels of a side), scaled bilinearly. What is
    outside of the picture is the nearest pixel that is inside."""
    height, width = images_NHWC.shape[1:3]
    left_N1, top_N1, size_N1 = (squares_N3[:, [column]].astype(np.float64) for column in range(3))
    steps = (np.arange(side) + 0.5) / side
    rows, columns = top_N1 + steps * size_N1 - 0.5, left_N1 + steps * size_N1 - 0.5
    (above, below, down), (before, after, right) = _between(rows, height), _between(columns, width)
    each = np.arange(len(images_NHWC))[:, None, None]
    images = images_NHWC.astype(np.float32)

    def along(at: np.ndarray) -> np.ndarray:
        """Rows `at`, blended between columns."""
        first, second = images[each, at[:, :, None], before[:, None]], images[each, at[:, :, None], after[:, None]]
        return first + (second - first) * right[:, None, :, None]

    upper, lower = along(above), along(below)
    return (upper + (lower - upper) * down[:, :, None, None]).round().astype(np.uint8)


def _between(places: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixel before, pixel after, share of the latter) of places on an axis."""
    inside = places.clip(0, length - 1)
    first = np.floor(inside).astype(np.int64)
    return first, np.minimum(first + 1, length - 1), (inside - first).astype(np.float32)
