"""Numbers of a composed picture beside the right answer, each a function of pictures and nothing else.

Pictures are uint8 [N, H, W, 3], masks bool [N, H, W]; each function returns float64 [N]. Differences of pixels are in
shares of the full range.

Letters: N pictures, K kinds.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from attnzoo.vision.trained_diffusion import from_pixels
from train.experiments.composition.reader import AT_ONCE, PictureReading, Reader

RING = 2
"""Pixels of the ring around an object in which a seam is looked for."""
DIRECTIONS = 8
"""Directions of colours on which palettes are compared."""


SPREAD = 4
"""Steps from an object's box within which styles may change pixels with it: they look two rows and columns around."""


def background_error(images: np.ndarray, backgrounds: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Root mean square difference from the background, over pixels that are more than `SPREAD` steps away from the
    object's box; 0 for right answers."""
    outside = ~boxes
    for _ in range(SPREAD):
        outside = ~_grown(~outside)
    square = np.square((images.astype(np.float64) - backgrounds) / 255).mean(-1)
    return np.sqrt((square * outside).sum((1, 2)) / np.maximum(outside.sum((1, 2)), 1))


@torch.no_grad()
def feature_distance(reader: Reader, images: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Distance of what the three stages of a reader find at each place, scaled to length 1; the mean over places,
    summed over stages. It is the distance of Zhang et al. 2018 (arXiv 1801.03924, equation 1) with features of our own
    reader and without learned weights: never to be called LPIPS."""
    found = []
    for start in range(0, len(images), AT_ONCE):
        both = [reader.maps(from_pixels(x[start : start + AT_ONCE])) for x in (images, answers)]
        stages = [F.normalize(one, dim=1) - F.normalize(other, dim=1) for one, other in zip(*both, strict=True)]
        found.append(sum(stage.double().square().sum(1).mean((1, 2)) for stage in stages))
    return torch.cat([torch.as_tensor(part) for part in found]).numpy()


def rank(told: PictureReading, kinds_N: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rank of the object's own kind among all kinds, by what a reader of squares says: 1 is best."""
    own_N1 = np.take_along_axis(told.kinds_NK, np.asarray(kinds_N)[:, None], 1)
    return 1.0 + (told.kinds_NK > own_N1).sum(1)


def style_fit(told: PictureReading, style_N: Sequence[int] | np.ndarray) -> np.ndarray:
    """The probability that the object has the background's style, by what a reader of squares says."""
    return np.take_along_axis(told.styles_NS, np.asarray(style_N)[:, None], 1)[:, 0]


def palette_distance(images: np.ndarray, answers: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The distance between the colours of the object's pixels and those of the answer, wherever they are: the
    Wasserstein distance, sliced (Rabin et al. 2011), the mean of `DIRECTIONS` even directions on a half sphere."""
    height = (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
    turn = np.pi * (3 - 5**0.5) * np.arange(DIRECTIONS)
    flat = np.sqrt(1 - height**2)
    slices_3D = np.stack([flat * np.cos(turn), flat * np.sin(turn), height])
    found = []
    for image, answer, region in zip(images, answers, regions, strict=True):
        one, other = (np.sort(x[region].astype(np.float64) / 255 @ slices_3D, axis=0) for x in (image, answer))
        found.append(np.abs(one - other).mean() if region.any() else 0.0)
    return np.array(found)


def seam(images: np.ndarray, answers: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """How far the edges around the object are from those of the answer: the size of the logarithm of the ratio of their
    gradient energies in a ring of `RING` pixels on both sides of the region's border. 0: as in the answer."""
    rings = ring(regions, RING)
    one, other = ((_gradient_energy(x) * rings).sum((1, 2)) for x in (images, answers))
    floor = FLAT * rings.sum((1, 2))
    return np.abs(np.log((one + floor) / (other + floor)))


FLAT = 1e-4
"""Gradient energy of a pixel that counts as none: steps of some two levels of 255."""


def ring(regions: np.ndarray, width: int) -> np.ndarray:
    """bool [N, H, W]: pixels up to `width` steps, along rows and columns, outside or inside of a region's border."""
    wider, inner = regions, regions
    for _ in range(width):
        wider, inner = _grown(wider), ~_grown(~inner)
    return wider & ~inner


def _grown(regions: np.ndarray) -> np.ndarray:
    found = regions.copy()
    found[:, 1:] |= regions[:, :-1]
    found[:, :-1] |= regions[:, 1:]
    found[:, :, 1:] |= regions[:, :, :-1]
    found[:, :, :-1] |= regions[:, :, 1:]
    return found


def _gradient_energy(images: np.ndarray) -> np.ndarray:
    """Squared differences from the pixel on the right and from that below, the mean of colours, [N, H, W]."""
    x = images.astype(np.float64) / 255
    down, right = (np.diff(x, axis=axis, append=np.take(x, [-1], axis)) for axis in (1, 2))
    return (down**2 + right**2).mean(-1)


def leakage(told: PictureReading, kinds_N: Sequence[int] | np.ndarray) -> np.ndarray:
    """The probability that the object's kind is in a picture whose object was taken out (`without_object`), by what a
    reader of whole pictures says."""
    return np.exp(np.take_along_axis(told.kinds_NK, np.asarray(kinds_N)[:, None], 1)[:, 0])


def without_object(images: np.ndarray, backgrounds: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Pictures with the background in place of the object's box."""
    return np.where(boxes[..., None], backgrounds, images)
