"""Cases of composition whose right answer is known.

A case is a scene of two objects in one of the styles. The background has the first object; the second one, which is
never styled, is to be composed into it. Styles are functions, so that the right answer is the style of the scene with
both objects (`attnzoo.vision.styles`). Up to a quarter of an object may be outside the picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnzoo.vision import STYLES, Scene, SceneWorld, bitmaps, caption
from attnzoo.vision.captions import phrase
from attnzoo.vision.compose import Placement

SEED = 7_000_000
"""Added to seeds, so that no case is a scene of a training run with a seed of usual size."""
TRIES = 1000
"""Scenes that are looked at for each case."""


@dataclass(frozen=True)
class CompositionCase:
    """placement: what is composed. style: of background and answer. kind: the number of the object's kind, other: that
    of the object in the background, strange: of one that is neither. ground: uint8 [H, W, 3], the
    background before it is styled; answer: the right answer; wrong: the answer with an object of the kind `strange` in
    its place."""

    placement: Placement
    style: str
    kind: int
    other: int
    strange: int
    ground: np.ndarray
    answer: np.ndarray
    wrong: np.ndarray

    @property
    def square(self) -> tuple[int, int, int]:
        """(left, top, side) of the object, which may be partly outside."""
        return self.placement.left, self.placement.top, len(self.placement.thing)

    def moved(self, right: int = 0, down: int = 0) -> np.ndarray:
        """The picture with the object elsewhere, uint8 [H, W, 3]; the right answer where it has not moved."""
        return STYLES[self.style](self.unstyled(right, down))

    def unstyled(self, right: int = 0, down: int = 0) -> np.ndarray:
        """The same before it is styled."""
        left, top = self.placement.left + right, self.placement.top + down
        return replace(self.placement, background=self.ground, left=left, top=top).pasted()

    def box(self) -> np.ndarray:
        """bool [H, W]: the part of the object's square that is in the picture."""
        found = np.zeros(self.answer.shape[:2], bool)
        found[self.placement.box()] = True
        return found


def world_of(data: Mapping[str, Any]) -> SceneWorld:
    """The scenes that a trained model has learned, from its `data`. Raises ValueError for a model of single objects."""
    world = SceneWorld.of(data)
    if world.options.most_objects < 2:
        raise ValueError("the model was trained with data.most_objects=1; composition needs pictures of two objects")
    return world


def make_cases(world: SceneWorld, styles: Sequence[str], seed: int, count: int) -> list[CompositionCase]:
    """`count` cases, the styles in turn. Each seed has its own."""
    found: list[CompositionCase] = []
    for index in range(TRIES * count):
        if len(found) == count:
            return found
        scene = world.scene("standard", SEED + seed, index)
        if len({placed.kind for placed in scene.objects}) == 2 == len(scene.objects):
            found.append(_case(world, scene, styles[len(found) % len(styles)]))
    raise ValueError(f"{count} scenes of two objects are wanted; few scenes have two")


def _case(world: SceneWorld, scene: Scene, style: str) -> CompositionCase:
    first, second = scene.objects
    below = replace(scene, objects=(first,))
    ground = world.image(below)
    others = [kind for kind in range(len(world.names)) if kind not in (first.kind, second.kind)]
    strange = others[np.random.default_rng((*scene.seed, 2)).integers(len(others))]
    things = bitmaps(scene.font, [world.names[kind] for kind in (second.kind, strange)], second.size)
    styled = STYLES[style]
    placement = Placement(
        styled(ground),
        things[0],
        left=int(second.x - second.size / 2),
        top=int(second.y - second.size / 2),
        background_caption=caption(below, style, world.names),
        caption=caption(scene, style, world.names),
        words=phrase(world.names[second.kind], 1),
    )
    answer, wrong = (styled(replace(placement, background=ground, thing=thing).pasted()) for thing in things)
    return CompositionCase(placement, style, second.kind, first.kind, strange, ground, answer, wrong)
