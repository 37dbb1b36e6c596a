"""Scenes of emoji with questions as training data. An index determines its scene, so that nothing is stored."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from attnzoo.vision import Scene, SceneQuestion, SceneWorld, training_questions
from attnzoo.vision.turns import Turns, padded
from train.data.base import Batch

SOURCE = "scenes"


def pictures(world: SceneWorld, scenes: Sequence[Scene]) -> Tensor:
    """uint8 [B, channels, height, width]."""
    return torch.from_numpy(np.stack([world.image(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


class SceneStream:
    """Training batches (images_BCHW, tokens_BT, targets_BT, groups_B, kinds_BP, named_BT): scene n of the stream is at
    place n of the concatenated global batches. turns: questions about each; text_share: of them, about words alone.
    side: patches along a side of a picture, of which kinds_BP says what is there (`SceneWorld.patch_kinds`). named_BT:
    the kind that a word names which ends with the token; -1 where none does."""

    def __init__(
        self, world: SceneWorld, reader: Turns, seed: int, *, turns: int, text_share: float, side: int
    ) -> None:
        self._world, self._reader, self._seed, self._used = world, reader, seed, 0
        self._turns, self._text_share, self._side = turns, text_share, side

    def next(self, batch_size: int, rank: int, world: int) -> Batch:
        """The batch of process `rank`."""
        first = self._used + rank * batch_size
        self._used += batch_size * world
        scenes = [self._world.scene("train", self._seed, index) for index in range(first, first + batch_size)]
        asked = [asked_about(self._world, scene, self._turns, self._text_share) for scene in scenes]
        tokens_BT, targets_BT = padded([self._reader.sequence(questions) for questions in asked])
        named_BT = torch.full_like(tokens_BT, -1)
        for row, questions in zip(named_BT, asked, strict=True):
            for place, kind in self._reader.ends(questions, self._world.words):
                row[place] = kind
        kinds_BP = torch.from_numpy(np.stack([self._world.patch_kinds(scene, self._side) for scene in scenes]))
        unasked_B = torch.full((batch_size,), -1)
        return pictures(self._world, scenes), tokens_BT, targets_BT, unasked_B, kinds_BP, named_BT

    def state(self) -> dict[str, int]:
        """The position in the stream."""
        return {"used": self._used}

    def load(self, state: Mapping[str, int]) -> None:
        """Continues from a position that `state` has returned."""
        self._used = int(state["used"])


def asked_about(world: SceneWorld, scene: Scene, turns: int, text_share: float) -> list[SceneQuestion]:
    """The questions about a training scene."""
    return training_questions(world, scene, turns, text_share, (*scene.seed, 3))
