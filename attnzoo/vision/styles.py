"""Domains of pictures as known functions: what a picture would look like as a cartoon, a sketch or a painting.

Because a domain is a function, the right answer of a composition is known: the function of the composed picture.
"""

from collections.abc import Callable

import numpy as np

Style = Callable[[np.ndarray], np.ndarray]
"""From uint8 [..., H, W, 3] to the same."""

LEVELS = 4
"""Of each channel of a cartoon."""
PALETTE = np.array(
    [
        (40, 30, 46), (92, 52, 44), (158, 74, 40), (206, 136, 60), (236, 200, 128), (248, 236, 206),
        (60, 88, 70), (112, 142, 96), (48, 66, 112), (98, 130, 166), (122, 68, 104), (168, 162, 152),
    ],
    dtype=np.float32,
)  # fmt: skip
"""Colours of paintings."""


def _photo(image: np.ndarray) -> np.ndarray:
    return image.copy()


def _cartoon(image: np.ndarray) -> np.ndarray:
    """Few levels of strong colours."""
    x = _blurred(image.astype(np.float32))
    gray = x.mean(-1, keepdims=True)
    strong = np.clip(gray + 1.6 * (x - gray), 0, 255)
    return (np.round(strong / 255 * (LEVELS - 1)) * (255 / (LEVELS - 1))).round().astype(np.uint8)


def _sketch(image: np.ndarray) -> np.ndarray:
    """Dark lines where brightness changes, on paper."""
    gray = _blurred(image.astype(np.float32)).mean(-1)
    down, right = np.zeros_like(gray), np.zeros_like(gray)
    down[..., 1:-1, :] = gray[..., 2:, :] - gray[..., :-2, :]
    right[..., :, 1:-1] = gray[..., :, 2:] - gray[..., :, :-2]
    lines = np.clip(1.6 * np.hypot(down, right), 0, 215)
    return np.repeat((245 - lines)[..., None], 3, axis=-1).round().astype(np.uint8)


def _painting(image: np.ndarray) -> np.ndarray:
    """Blurred, in the colours of a palette."""
    x = _blurred(_blurred(image.astype(np.float32)))
    distance = np.square(x[..., None, :] - PALETTE).sum(-1)
    return PALETTE[distance.argmin(-1)].astype(np.uint8)


def _blurred(x: np.ndarray) -> np.ndarray:
    """Weights 1, 2, 1 along both sides; the border is repeated."""
    for axis in (-3, -2):
        width = [(0, 0)] * x.ndim
        width[axis] = (1, 1)
        padded = np.pad(x, width, mode="edge")
        before, after = (np.take(padded, np.arange(start, start + x.shape[axis]), axis) for start in (0, 2))
        x = (before + 2 * x + after) / 4
    return x


STYLES: dict[str, Style] = {"photo": _photo, "cartoon": _cartoon, "sketch": _sketch, "painting": _painting}
"""Domains by the name that captions call them."""
