"""Keeps the weights of the best evaluations of a run (`eval.keep_best`); the export takes their mean."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.engine import TrainingEngine


class BestWeights:
    """The best evaluations so far, the best first.

    scores: [step, score] of each, the same on every rank. Rank 0 alone has the weights, by step (float32, on the CPU).
    """

    def __init__(self, most: int) -> None:
        """most: how many are kept."""
        self.most = most
        self.scores: list[list[float]] = []
        self._weights: dict[int, dict[str, Tensor]] = {}

    def offer(self, engine: TrainingEngine, step: int, score: float) -> None:
        """Keeps the present weights if their score is among the best; of equal scores the earlier step's. All ranks."""
        if not math.isfinite(score):
            return
        others = [each for each in self.scores if each[0] != step]
        ranked = sorted([*others, [step, score]], key=lambda each: (-each[1], each[0]))[: self.most]
        if [step, score] not in ranked:
            return
        weights = engine.full_state()
        if weights is not None:
            self._weights[step] = weights
        self.scores = ranked
        self._weights = {int(step): self._weights[int(step)] for step, _ in ranked if int(step) in self._weights}

    def mean(self) -> dict[str, Tensor]:
        """The mean of the kept weights; what is no real number is the best one's. Rank 0."""
        best, *others = [self._weights[int(step)] for step, _ in self.scores]
        return {
            name: torch.stack([first, *(each[name] for each in others)]).mean(0) if first.is_floating_point() else first
            for name, first in best.items()
        }

    def save(self, directory: Path) -> None:
        """Writes the weights into a checkpoint; the scores stand in its progress. Rank 0."""
        for step, weights in self._weights.items():
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, _file(directory, step))

    def load(self, directory: Path, scores: list[list[float]], is_main: bool) -> None:
        """Goes back to what a checkpoint holds, cut to `most`."""
        self.scores = scores[: self.most]
        self._weights = {int(step): load_file(_file(directory, step)) for step, _ in self.scores} if is_main else {}


def _file(directory: Path, step: float) -> str:
    return str(directory / f"selected-{int(step):08d}.safetensors")
