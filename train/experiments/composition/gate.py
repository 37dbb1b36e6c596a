"""Whether a trained model draws what it is told: read by a network that knows nothing of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attnzoo.vision.backgrounds import COLOURS, TEXTURES
from attnzoo.vision.captions import background_phrase, phrase
from attnzoo.vision.trained_diffusion import TrainedDiffusion, to_pixels


@dataclass(frozen=True)
class GatePrompt:
    """A caption of one object, the number of its kind and of its style, and the seed of its noise."""

    caption: str
    kind: int
    style: int
    seed: int


def prompts(names: Sequence[str], styles: Sequence[str], seed: int, each: int) -> list[GatePrompt]:
    """Every kind in every style `each` times, on backgrounds by chance."""
    random = np.random.default_rng((seed, 3))
    found: list[GatePrompt] = []
    for number in range(each):
        for style, style_name in enumerate(styles):
            for kind, name in enumerate(names):
                colour, texture = (list(known)[random.integers(len(known))] for known in (COLOURS, TEXTURES))
                text = f"a {style_name} of {phrase(name, 1)} on {background_phrase(colour, texture)}"
                found.append(GatePrompt(text, kind, style, (seed * each + number) * 10_000 + len(found)))
    return found


def drawn_prompts(
    trained: TrainedDiffusion, given: Sequence[GatePrompt], steps: int, batch: int, tick: Callable[[], None]
) -> np.ndarray:
    """uint8 [N, H, W, 3]: what the model draws. tick: called after every `batch` pictures, `steps` times."""
    found = []
    for start in range(0, len(given), batch):
        some = given[start : start + batch]
        drawn = trained.draw([prompt.caption for prompt in some], [prompt.seed for prompt in some], steps=steps)
        found.append(to_pixels(drawn))
        for _ in range(steps):
            tick()
    return np.concatenate(found)
