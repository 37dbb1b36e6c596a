"""Textured backgrounds of a named colour."""

from collections.abc import Callable

import numpy as np

COLOURS = {
    "red": (196, 62, 58),
    "green": (76, 158, 82),
    "blue": (66, 106, 196),
    "yellow": (222, 198, 76),
    "purple": (138, 82, 176),
    "gray": (142, 142, 142),
}
"""Names of colours; a background differs from these by up to JITTER a channel, by its texture and by noise."""
JITTER, CONTRAST, NOISE = 16, 48, 10
"""In steps of 8-bit channels."""

Pattern = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def _plain(random: np.random.Generator, x_1W: np.ndarray, y_H1: np.ndarray) -> np.ndarray:
    return np.zeros((y_H1.shape[0], x_1W.shape[1]))


def _gradient(random: np.random.Generator, x_1W: np.ndarray, y_H1: np.ndarray) -> np.ndarray:
    angle, reach = random.uniform(0, 2 * np.pi), max(x_1W.size, y_H1.size)
    return (np.cos(angle) * x_1W + np.sin(angle) * y_H1) / reach


def _stripes(random: np.random.Generator, x_1W: np.ndarray, y_H1: np.ndarray) -> np.ndarray:
    angle, period = random.uniform(0, np.pi), random.uniform(5, 12)
    return np.sign(np.sin((np.cos(angle) * x_1W + np.sin(angle) * y_H1) * 2 * np.pi / period)) / 2


def _checks(random: np.random.Generator, x_1W: np.ndarray, y_H1: np.ndarray) -> np.ndarray:
    side = int(random.integers(4, 10))
    left, top = random.integers(0, side, 2)
    return ((x_1W + left) // side + (y_H1 + top) // side) % 2 - 0.5


def _dots(random: np.random.Generator, x_1W: np.ndarray, y_H1: np.ndarray) -> np.ndarray:
    period = int(random.integers(6, 12))
    left, top = random.integers(0, period, 2)
    x, y = (x_1W + left) % period - period / 2, (y_H1 + top) % period - period / 2
    return np.where(x * x + y * y < (period / 3.2) ** 2, 0.7, -0.3)


TEXTURES: dict[str, Pattern] = {
    "plain": _plain,
    "gradient": _gradient,
    "striped": _stripes,
    "checked": _checks,
    "dotted": _dots,
}
"""Patterns by name: a mean near 0 and a range near 1."""


def background(random: np.random.Generator, size: int, colour: str, texture: str) -> np.ndarray:
    """uint8 [size, size, 3]."""
    axis = np.arange(size)
    pattern_HW = TEXTURES[texture](random, axis[None], axis[:, None])
    base_C = np.array(COLOURS[colour]) + random.integers(-JITTER, JITTER + 1, 3)
    noise_HWC = random.integers(-NOISE, NOISE + 1, (size, size, 3), dtype=np.int16)
    return np.clip(base_C + CONTRAST * pattern_HW[..., None] + noise_HWC, 0, 255).astype(np.uint8)
