"""The ways of composing that are compared, and what each costs.

Inversion + paste, without infusion, without region constraint and full PrimeComposer differ in two switches, infusion
and region constraint, and share inversion, pasted latents, the background that is set back, and guidance.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from attnzoo.diffusion import grid, guided, noised, solve
from attnzoo.vision.compose import ComposeOptions, Inverted, Placement, compose, invert_cases
from attnzoo.vision.trained_diffusion import TrainedDiffusion, from_pixels, to_pixels
from train.experiments.composition.cases import CompositionCase

PASTE, SDEDIT, INVERSION = "cut and paste", "SDEdit", "inversion + paste"
NO_INFUSION, NO_REGION, FULL = "without infusion", "without region constraint", "PrimeComposer"
COMPOSED = (INVERSION, NO_INFUSION, NO_REGION, FULL)
ARMS = (PASTE, SDEDIT, *COMPOSED)
Settings = dict[str, Any]
"""Values of `ComposeOptions` by name."""
SETTINGS: dict[str, Settings] = {
    "photo": {"guidance": 2.0, "infused": 0.3, "pasted": 0.1},
    "painting": {"guidance": 2.5, "infused": 0.3, "pasted": 0.2},
    "cartoon": {"guidance": 3.0, "infused": 0.4, "pasted": 0.3},
    "sketch": {"guidance": 2.5, "infused": 0.6, "pasted": 0.3},
}
"""The paper's settings by the background's style; photo is what it calls the same domain."""
SWITCHES: dict[str, Settings] = {
    INVERSION: {"infused": 0.0, "confined": False},
    NO_INFUSION: {"infused": 0.0},
    NO_REGION: {"confined": False},
    FULL: {},
}
"""What an arm changes of the settings."""
NOISED = 0.0
"""lambda from which SDEdit (Meng et al. 2022, arXiv 2108.01073) goes on: as much image as noise."""


@dataclass
class ArmCost:
    """tick: called at every call of the model. forwards: rows that the model has seen. seconds: of the arm; those of
    the inversion, which the composing arms share, count for each of them."""

    tick: Callable[[], None]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ARMS, 0.0))
    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))

    @contextmanager
    def of(self, trained: TrainedDiffusion, arms: Sequence[str]) -> Iterator[None]:
        """Adds what happens inside to all of these arms."""
        rows = 0

        def count(module: object, given: tuple[torch.Tensor, ...]) -> None:
            nonlocal rows
            rows += len(given[0])
            self.tick()

        hook, start = trained.model.register_forward_pre_hook(count), time.perf_counter()
        try:
            yield
        finally:
            hook.remove()
            for arm in arms:
                self.seconds[arm] += time.perf_counter() - start
                self.forwards[arm] += rows


def options_of(style: str, arm: str, steps: int) -> ComposeOptions:
    """The settings of a composing arm for backgrounds of a style."""
    return replace(ComposeOptions(steps=steps), **{**SETTINGS[style], **SWITCHES[arm]})


def model_calls(style: str, steps: int) -> int:
    """How often `run_arms` calls the model."""
    infused = [options_of(style, arm, steps).infused for arm in COMPOSED]
    return max(1, steps // 2) + 2 * steps + sum(steps + round(share * steps) for share in infused)


def run_arms(
    trained: TrainedDiffusion,
    cases: Sequence[CompositionCase],
    seeds: Sequence[int],
    steps: int,
    tick: Callable[[], None],
) -> tuple[dict[str, np.ndarray], ArmCost]:
    """What each arm makes of cases of one style, uint8 [N, H, W, 3], and what they cost. seeds: of noise, one a case;
    SDEdit alone draws any. tick: called `model_calls` times."""
    (style,) = {case.style for case in cases}
    placements, cost = [case.placement for case in cases], ArmCost(tick)
    with cost.of(trained, [PASTE]):
        found = {PASTE: np.stack([placement.pasted() for placement in placements])}
    with cost.of(trained, [SDEDIT]):
        found[SDEDIT] = sdedit(trained, placements, seeds, steps, SETTINGS[style]["guidance"])
    with cost.of(trained, COMPOSED):
        inverted = invert_cases(trained, placements, steps)
    for arm in COMPOSED:
        with cost.of(trained, [arm]):
            found[arm] = composed(trained, placements, options_of(style, arm, steps), inverted)
    return found, cost


def composed(
    trained: TrainedDiffusion, placements: Sequence[Placement], options: ComposeOptions, inverted: Inverted
) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    return to_pixels(compose(trained, placements, options, inverted))


@torch.no_grad()
def sdedit(
    trained: TrainedDiffusion, placements: Sequence[Placement], seeds: Sequence[int], steps: int, guidance: float
) -> np.ndarray:
    """What the model makes of the pasted picture once it is half noise, uint8 [N, H, W, 3]: the later half of the
    steps."""
    pasted = from_pixels(np.stack([placement.pasted() for placement in placements]))
    words_NL = trained.encode([placement.caption for placement in placements])
    start = noised(pasted, trained.noise(seeds), torch.full((len(pasted),), NOISED))
    denoise = guided(trained.model, words_NL, torch.full_like(words_NL, -1), guidance)
    return to_pixels(solve(start, denoise, grid(max(1, steps // 2), start=NOISED)))
