"""Scenes of one to four named emoji on textured backgrounds, each determined by a seed and an index.

A `SceneWorld` says what is likely in scenes: some kinds are more frequent than others, and kinds come in twos that tend
to be together (`bias`), so that a model can learn to expect what it does not see. It also keeps something back from
training: pairs of kinds that are never together, for every kind a ninth of the picture where it never stands, and the
emoji of another font.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from attnzoo.types import CheckedConfig
from attnzoo.vision.backgrounds import COLOURS, TEXTURES, background
from attnzoo.vision.emoji import EMOJI, bitmaps, font_path

Split = Literal["train", "standard", "pairs", "positions", "font"]
"""train: what is learned from. standard: other scenes of the same kind. pairs: with two kinds that are kept apart in
training; positions: every object where its kind never stands in training; font: other emoji."""
SPLITS: tuple[Split, ...] = get_args(Split)
CELLS = 3
"""A picture has CELLS x CELLS cells; one of them is kept back for every kind."""
TRIES = 30
"""Places that are tried for an object before the scene goes without it."""
REPEATS = 0.2
"""The probability that another object is of a kind that the scene has already, so that there is something to count."""


@dataclass(frozen=True, kw_only=True)
class SceneOptions(CheckedConfig):
    """image_size: pixels of a side. kinds: how many kinds of emoji there are. most_objects: in one scene. smallest,
    largest: sizes of objects in pixels; up to a quarter of an object may be outside the picture. font: of the emoji, a
    name of `attnzoo.vision.emoji.FONTS` or a path. held_out_font: that of other emoji for evaluation; null: none. bias:
    the probability that the kind that goes with one is there too. held_out_pairs: the share of pairs of kinds that
    are never together in training. held_out_positions: whether there is a place for every kind where it never stands
    in training. world: a seed that decides which pairs and places."""

    image_size: int = 64
    kinds: int = 16
    most_objects: int = 4
    smallest: int = 14
    largest: int = 22
    font: str = "openmoji"
    held_out_font: str | None = "noto"
    bias: float = 0.5
    held_out_pairs: float = 0.1
    held_out_positions: bool = True
    world: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 4 <= self.kinds <= len(EMOJI):
            raise ValueError(f"kinds={self.kinds} must be from 4 to {len(EMOJI)}")
        if not 1 <= self.most_objects <= 4:
            raise ValueError(f"most_objects={self.most_objects} must be from 1 to 4")
        if not 4 <= self.smallest <= self.largest:
            raise ValueError(f"smallest={self.smallest}, largest={self.largest}: give sizes from 4 pixels on, in order")
        if self.largest > self.image_size // 2:
            raise ValueError(
                f"largest={self.largest} must be at most half of image_size={self.image_size}: objects need room"
            )
        for name in ("bias", "held_out_pairs"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.world < 0:
            raise ValueError(f"world={self.world} must be at least 0")

    @property
    def names(self) -> tuple[str, ...]:
        """What the kinds are called."""
        return tuple(EMOJI)[: self.kinds]

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits of evaluation that these options have."""
        kept: dict[Split, bool] = {
            "standard": True,
            "pairs": self.most_objects > 1 and self.held_out_pairs > 0,
            "positions": self.held_out_positions,
            "font": self.held_out_font is not None,
        }
        return tuple(split for split, there in kept.items() if there)


@dataclass(frozen=True)
class SceneObject:
    """An object: the number of its kind, the middle of its square and its side, in pixels."""

    kind: int
    x: float
    y: float
    size: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture, later objects in front of earlier ones. seed: of the background's details."""

    objects: tuple[SceneObject, ...]
    colour: str
    texture: str
    font: str
    seed: tuple[int, ...]

    def count(self, kind: int) -> int:
        """Objects of a kind."""
        return sum(placed.kind == kind for placed in self.objects)

    @property
    def single(self) -> tuple[SceneObject, ...]:
        """The objects whose kind is there once, so that its name means one of them."""
        return tuple(placed for placed in self.objects if self.count(placed.kind) == 1)


class SceneWorld:
    """Scenes and pictures by split, seed and index. Raises ValueError where a font is not installed."""

    def __init__(self, options: SceneOptions) -> None:
        self.options = options
        self.names = options.names
        self.words = {word: kind for kind, name in enumerate(self.names) for word in (name, EMOJI[name].plural)}
        """What kinds are called, singular and plural."""
        kinds = np.arange(options.kinds)
        weights = 1 / np.sqrt(1 + kinds)
        self.popularity = weights / weights.sum()
        """How often a kind is drawn; the first kinds are the popular ones."""
        self._cumulative = np.cumsum(self.popularity)
        self.partner = np.where(kinds ^ 1 < options.kinds, kinds ^ 1, 0)
        """The kind that tends to be there too."""
        random = np.random.default_rng((options.world, 0))
        others = [(a, b) for a in kinds.tolist() for b in kinds.tolist() if a < b and b != self.partner[a] != b]
        others = [(a, b) for a, b in others if self.partner[b] != a]
        count = round(options.held_out_pairs * len(others))
        chosen = sorted(random.permutation(len(others))[:count].tolist())
        self.held_out_pairs = tuple(others[i] for i in chosen)
        self._apart = {(a, b) for pair in self.held_out_pairs for a, b in (pair, pair[::-1])}
        self.held_out_cells = random.integers(0, CELLS * CELLS, options.kinds)
        """For each kind the number of the cell, row by row, where it never stands in training."""
        self._bitmaps: dict[tuple[str, int], np.ndarray] = {}
        self._look_for_fonts()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "SceneWorld":
        """The scenes that a trained model has learned, from its `data`, whose other keys are left out."""
        known = {each.name for each in fields(SceneOptions)}
        return cls(SceneOptions(**{key: value for key, value in data.items() if key in known}))

    def _look_for_fonts(self) -> None:
        """Raises ValueError that names the option for a font that is not installed or lacks an emoji."""
        options = self.options
        font_path(options.font)
        self._emoji(options.font, options.largest)
        if options.held_out_font is not None:
            try:
                font_path(options.held_out_font, "held_out_font")
            except ValueError as error:
                raise ValueError(f"{error}; or go without: held_out_font=null") from None
            self._emoji(options.held_out_font, options.largest)

    # --- what is in a scene -------------------------------------------------------------------------------------

    def scene(self, split: Split, seed: int, index: int) -> Scene:
        """The scene with this index."""
        key = (self.options.world, SPLITS.index(split), seed, index)
        random, options = np.random.default_rng(key), self.options
        kinds = self._kinds(random, split)
        objects: list[SceneObject] = []
        for kind in kinds:
            placed = self._placed(random, kind, objects, inside=split == "positions")
            if placed is not None:
                objects.append(placed)
        colour = list(COLOURS)[random.integers(len(COLOURS))]
        texture = list(TEXTURES)[random.integers(len(TEXTURES))]
        font = options.held_out_font if split == "font" and options.held_out_font else options.font
        return Scene(tuple(objects), colour, texture, font, (*key, 1))

    def _kinds(self, random: np.random.Generator, split: Split) -> list[int]:
        count = int(random.integers(1, self.options.most_objects + 1))
        if split == "pairs":
            pair = self.held_out_pairs[random.integers(len(self.held_out_pairs))]
            kinds, count = list(pair), max(count, 2)
        else:
            kinds = [self._drawn(random)]
        while len(kinds) < count:
            chance, last = random.random(), kinds[-1]
            if chance < REPEATS:
                kinds.append(kinds[int(random.integers(len(kinds)))])
            elif chance < REPEATS + (1 - REPEATS) * self.options.bias and self.partner[last] not in kinds:
                kinds.append(self._unless_apart(random, int(self.partner[last]), kinds))
            else:
                kinds.append(self._unless_apart(random, self._drawn(random), kinds))
        return kinds

    def _drawn(self, random: np.random.Generator) -> int:
        """A kind by popularity."""
        return min(int(np.searchsorted(self._cumulative, random.random())), self.options.kinds - 1)

    def _unless_apart(self, random: np.random.Generator, kind: int, kinds: list[int]) -> int:
        """The kind, or another one that is kept apart from none of `kinds`."""
        for _ in range(TRIES):
            if not any((kind, other) in self._apart for other in kinds):
                return kind
            kind = self._drawn(random)
        return kinds[0]

    def _placed(
        self, random: np.random.Generator, kind: int, before: list[SceneObject], inside: bool
    ) -> SceneObject | None:
        """An object where it hides no other, in its kept-back cell (`inside`) or outside of it."""
        options = self.options
        for _ in range(TRIES * 10 if inside else TRIES):
            size = int(random.integers(options.smallest, options.largest + 1))
            left, top = (int(v) for v in random.integers(-(size // 4), options.image_size - size + size // 4 + 1, 2))
            placed = SceneObject(kind, left + size / 2, top + size / 2, size)
            if options.held_out_positions and (self.cell(placed) == self.held_out_cells[kind]) != inside:
                continue
            if all(max(abs(placed.x - o.x), abs(placed.y - o.y)) >= 0.45 * (size + o.size) for o in before):
                return placed
        return None

    def cell(self, placed: SceneObject) -> int:
        """The number of the cell in which the object's middle is."""
        side = self.options.image_size / CELLS
        column, row = (min(max(int(v // side), 0), CELLS - 1) for v in (placed.x, placed.y))
        return row * CELLS + column

    def patch_kinds(self, scene: Scene, side: int) -> np.ndarray:
        """int64 [side * side]: the kind of the object whose square covers the middle of each patch, row by row; the
        number of kinds where there is none."""
        size = self.options.image_size / side
        middles = (np.arange(side) + 0.5) * size
        found = np.full((side, side), self.options.kinds)
        for placed in scene.objects:
            rows, columns = (abs(middles - at) <= placed.size / 2 for at in (placed.y, placed.x))
            found[np.ix_(rows, columns)] = placed.kind
        return found.reshape(-1)

    # --- what it looks like -------------------------------------------------------------------------------------

    def image(self, scene: Scene) -> np.ndarray:
        """uint8 [image_size, image_size, 3]."""
        size = self.options.image_size
        image = background(np.random.default_rng(scene.seed), size, scene.colour, scene.texture)
        for placed in scene.objects:
            top, left = int(placed.y - placed.size / 2), int(placed.x - placed.size / 2)
            emoji = self._emoji(scene.font, placed.size)[placed.kind]
            emoji = emoji[max(-top, 0) : size - top, max(-left, 0) : size - left].astype(np.int32)
            under = image[max(top, 0) : top + placed.size, max(left, 0) : left + placed.size]
            opacity = emoji[..., 3:]
            under[:] = (emoji[..., :3] * opacity + under * (255 - opacity) + 127) // 255
        return image

    def _emoji(self, font: str, size: int) -> np.ndarray:
        if (font, size) not in self._bitmaps:
            self._bitmaps[font, size] = bitmaps(font, self.names, size)
        return self._bitmaps[font, size]

    @cached_property
    def digest(self) -> str:
        """Of the options and of what the emoji look like: versions of fonts and of what draws them may differ."""
        options, found = self.options, hashlib.sha256(repr(self.options).encode())
        for font in (options.font, options.held_out_font):
            if font is not None:
                found.update(bitmaps(font, self.names, options.largest).tobytes())
        return found.hexdigest()[:16]
