"""A small network that reads which emoji are in a picture and in which style it is: independent of what drew it.

It learns from pictures that the generator of scenes draws, never from those of a trained model. There are two: one
reads whole pictures, one reads squares (`crops.cut`) in which the object often has another style than what is around
it, so that it learns to look at the object.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.vision import STYLES, SceneWorld, bitmaps
from attnzoo.vision.compose import Placement
from attnzoo.vision.trained_diffusion import from_pixels
from train.experiments.composition.crops import cut

WIDTHS = (32, 64, 128)
BATCH, RATE = 64, 2e-3
AT_ONCE = 256
"""Pictures that are read at once."""
MIXED = 0.5
"""The share of squares whose object may have another style than what is around it."""
TRAINED, HELD_OUT = 0, 1
"""Parts of keys: pictures that are learned from, and others."""


class Reader(nn.Module):
    """forward(x [N, 3, H, W]): (logits of each kind being there [N, K], logits of styles [N, S]). Convolutions at three
    resolutions; what they find is averaged and its largest taken over the picture, and both are mapped linearly."""

    def __init__(self, kinds: int, styles: int) -> None:
        super().__init__()
        before, stages = 3, []
        for level, width in enumerate(WIDTHS):
            first = nn.Conv2d(before, width, 3, stride=1 if level == 0 else 2, padding=1, bias=False)
            second = nn.Conv2d(width, width, 3, padding=1, bias=False)
            parts = [first, nn.BatchNorm2d(width), nn.ReLU()]
            if level:
                parts += [second, nn.BatchNorm2d(width), nn.ReLU()]
            stages.append(nn.Sequential(*parts))
            before = width
        self.stages = nn.ModuleList(stages)
        self.kind, self.style = nn.Linear(2 * before, kinds), nn.Linear(2 * before, styles)

    def maps(self, x_NCHW: Tensor) -> list[Tensor]:
        """What the three stages find, each [N, C, H, W] of its own size."""
        found = []
        for stage in self.stages:
            x_NCHW = stage(x_NCHW)
            found.append(x_NCHW)
        return found

    def pooled(self, x_NCHW: Tensor) -> Tensor:
        """What the last stage finds: mean and largest over the picture, [N, 2 C]."""
        last = self.maps(x_NCHW)[-1].flatten(2)
        return torch.cat([last.mean(2), last.amax(2)], 1)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        found_ND = self.pooled(x_NCHW)
        return self.kind(found_ND), self.style(found_ND)


@dataclass(frozen=True)
class PictureReading:
    """What a reader says of pictures: kinds_NK, log probabilities of each kind being there; styles_NS, probabilities of
    each style; features_ND."""

    kinds_NK: np.ndarray
    styles_NS: np.ndarray
    features_ND: np.ndarray

    def kind(self) -> np.ndarray:
        """The most likely kind, [N]."""
        return self.kinds_NK.argmax(1)


@torch.no_grad()
def read(reader: Reader, images_NHWC: np.ndarray) -> PictureReading:
    """Of uint8 pictures."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(images_NHWC), AT_ONCE):
        pooled = reader.pooled(from_pixels(images_NHWC[start : start + AT_ONCE]))
        found.append((F.logsigmoid(reader.kind(pooled)), reader.style(pooled).softmax(1), pooled))
    kinds, styles, features = (torch.cat(parts).double().numpy() for parts in zip(*found, strict=True))
    return PictureReading(kinds, styles, features)


Draw = Callable[[SceneWorld, Sequence[str], np.random.Generator, int], tuple[np.ndarray, np.ndarray, int]]
"""From (scenes, styles, random numbers, a picture's number) to (picture, kinds that are there, its style's number)."""


def whole_picture(
    world: SceneWorld, styles: Sequence[str], random: np.random.Generator, index: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """A scene in a style."""
    scene = world.scene("train", int(random.integers(2**31)), index)
    style = int(random.integers(len(styles)))
    kinds = np.array([placed.kind for placed in scene.objects])
    return STYLES[styles[style]](world.image(scene)), kinds, style


def object_square(
    world: SceneWorld, styles: Sequence[str], random: np.random.Generator, index: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The square around an object of any kind, all kinds alike, up to a pixel beside it. The style is that of the
    object."""
    scene = world.scene("train", int(random.integers(2**31)), index)
    chosen = scene.objects[int(random.integers(len(scene.objects)))]
    kind, style = int(random.integers(len(world.names))), int(random.integers(len(styles)))
    ground = world.image(replace(scene, objects=tuple(other for other in scene.objects if other is not chosen)))
    thing = bitmaps(scene.font, [world.names[kind]], chosen.size)[0]
    left, top = int(chosen.x - chosen.size / 2), int(chosen.y - chosen.size / 2)
    pasted = Placement(ground, thing, left, top, "", "", "")
    image = STYLES[styles[style]](pasted.pasted())
    if random.random() < MIXED:
        around = STYLES[styles[int(random.integers(len(styles)))]](ground)
        if styles[style] == "photo":
            image = replace(pasted, background=around).pasted()
        else:
            image = np.where(pasted.region()[..., None], image, around)
    beside = random.integers(-1, 2, 2)
    square = np.array([[left + beside[0], top + beside[1], chosen.size]])
    return cut(image[None], square)[0], np.array([kind]), style


@dataclass(frozen=True)
class Drawn:
    """Pictures with what is in them. images: uint8 [N, H, W, 3]; there_NK: whether a kind is there; style_N."""

    images: np.ndarray
    there_NK: np.ndarray
    style_N: np.ndarray


def drawn(draw: Draw, world: SceneWorld, styles: Sequence[str], key: tuple[int, ...], count: int) -> Drawn:
    """`count` pictures that the key determines."""
    random = np.random.default_rng(key)
    each = [draw(world, styles, random, index) for index in range(count)]
    there_NK = np.zeros((count, len(world.names)), bool)
    for row, (_, kinds, _) in enumerate(each):
        there_NK[row, kinds] = True
    return Drawn(np.stack([image for image, _, _ in each]), there_NK, np.array([style for _, _, style in each]))


def train_reader(
    draw: Draw, world: SceneWorld, styles: Sequence[str], *, seed: int, steps: int, tick: Callable[[], None]
) -> Reader:
    """A reader, in evaluation mode, that has learned from new pictures in every step, some of them noisy or blurred as
    drawn pictures are. tick: called after every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(len(world.names), len(styles))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    for step in range(steps):
        found = drawn(draw, world, styles, (seed, TRAINED, step), BATCH)
        images = _worn(from_pixels(found.images), torch.Generator().manual_seed(seed * 1_000_003 + step))
        kinds_NK, styles_NS = reader(images)
        there_NK = torch.from_numpy(found.there_NK).float()
        loss = F.binary_cross_entropy_with_logits(kinds_NK, there_NK, reduction="sum") / BATCH
        loss = loss + F.cross_entropy(styles_NS, torch.from_numpy(found.style_N))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    return reader.eval()


def _worn(x_NCHW: Tensor, random: torch.Generator) -> Tensor:
    """A third of the pictures with noise, a quarter a little blurred."""
    rows = (len(x_NCHW), 1, 1, 1)
    noisy = 0.12 * torch.rand(rows, generator=random) * (torch.rand(rows, generator=random) < 1 / 3)
    share = 0.8 * torch.rand(rows, generator=random) * (torch.rand(rows, generator=random) < 1 / 4)
    soft = F.avg_pool2d(F.pad(x_NCHW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(x_NCHW, soft, share) + noisy * torch.randn(x_NCHW.shape, generator=random)


def accuracy(reader: Reader, found: Drawn) -> dict[str, np.ndarray]:
    """Of each picture whether its kinds are the most likely ones, and whether its style is, bool [N]."""
    told = read(reader, found.images)
    count_N = found.there_NK.sum(1)
    rank_NK = (-told.kinds_NK).argsort(1).argsort(1)
    right = ((rank_NK < count_N[:, None]) == found.there_NK).all(1)
    return {"kinds": right, "style": told.styles_NS.argmax(1) == found.style_N}


def to_arrays(reader: Reader) -> dict[str, np.ndarray]:
    """Its weights."""
    return {name: value.numpy() for name, value in reader.state_dict().items()}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Reader:
    """The reader with these weights, in evaluation mode."""
    reader = Reader(len(arrays["kind.bias"]), len(arrays["style.bias"]))
    reader.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return reader.eval()
