"""Experiment P: objects composed into pictures by PrimeComposer (Wang et al. 2024, arXiv 2403.05053), with a diffusion
model of `configs/diffusion-emoji.yaml`.

Published figures rest on networks that are no part of this project (CLIP, LPIPS). Here the right answer of every case
is known instead, because styles are functions; networks of our own read objects and styles, and every metric must order
pictures that are known to be good and bad before it is believed (`train/experiments/composition`).

Parts keep their results in the run's directory: the same command goes on where an interrupted one was. Results are of
the model's weights, the seed and the sizes (readers: of the scenes in place of the weights); after a change of the code
remove the folder `prime-composer`.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from attnzoo.checkpoint import model_files
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Tick, Values
from train.experiments.composition.arms import SETTINGS, model_calls, run_arms
from train.experiments.composition.cases import CompositionCase, world_of
from train.experiments.composition.gate import drawn_prompts
from train.experiments.composition.kept import Arrays, kept
from train.experiments.composition.plan import MORE_SEEDS, Sizes, cases_of, model_of, part_name, prompts_of
from train.experiments.composition.reader import (
    HELD_OUT,
    Draw,
    accuracy,
    drawn,
    object_square,
    to_arrays,
    train_reader,
    whole_picture,
)
from train.experiments.prime_composer_figures import draw
from train.experiments.prime_composer_judge import PROMPTS, READ_PICTURES, READ_SQUARES, judge

FOLDER = "prime-composer"
READERS: dict[str, Draw] = {READ_PICTURES: whole_picture, READ_SQUARES: object_square}
BATCH = 32


def keep(
    config: ExperimentConfig, name: str, key: Mapping[str, Any], make: Callable[[], Arrays]
) -> tuple[Arrays, bool]:
    """`kept` in the run's directory, or beside an export that is given without its run. key: what the result depends
    on besides the seed."""
    assert config.trained is not None
    inside = model_files.find(config.trained) != config.trained
    folder = config.trained / FOLDER if inside else config.trained.with_name(f"{config.trained.name}-{FOLDER}")
    return kept(folder, name, {"seed": config.seed, **key}, make)


def weights_of(config: ExperimentConfig) -> str:
    """A digest of the trained model's weights."""
    assert config.trained is not None
    return hashlib.sha256((model_files.find(config.trained) / model_files.WEIGHTS).read_bytes()).hexdigest()


def reader(config: ExperimentConfig, tick: Tick, name: str) -> Values:
    """The weights of a reader, and on how many held-out pictures it was right. seconds: of its training."""
    sizes, data, draw = Sizes.of(config), model_of(config).data, READERS[name]
    world, styles, count = world_of(data), data["styles"], 0

    def counted() -> None:
        nonlocal count
        count += 1
        tick()

    def make() -> Arrays:
        start = time.perf_counter()
        found = train_reader(draw, world, styles, seed=config.seed, steps=sizes.learned, tick=counted)
        seconds = time.perf_counter() - start
        held_out = drawn(draw, world, styles, (config.seed, HELD_OUT), sizes.tested)
        right = {f"right {what}": right_N for what, right_N in accuracy(found, held_out).items()}
        weights = {f"weights {key}": value for key, value in to_arrays(found).items()}
        return {**weights, **right, "style": held_out.style_N, "seconds": np.array(seconds)}

    scenes = {**asdict(world.options), "styles": list(styles)}
    arrays, _ = keep(config, name, {"scenes": scenes, "learned": sizes.learned, "tested": sizes.tested}, make)
    for _ in range(sizes.learned - count):
        tick()
    return arrays


def drawing(config: ExperimentConfig, tick: Tick) -> Values:
    """What the model draws for the prompts, in their order."""
    sizes, trained = Sizes.of(config), model_of(config)
    given = prompts_of(config, trained)

    def make() -> Arrays:
        start = time.perf_counter()
        images = drawn_prompts(trained, given, sizes.steps, BATCH, tick)
        return {"images": images, "seconds": np.array(time.perf_counter() - start)}

    key = {"weights": weights_of(config), "steps": sizes.steps, "prompts": sizes.prompts}
    arrays, old = keep(config, PROMPTS, key, make)
    for _ in range(_drawing_steps(config, len(given)) if old else 0):
        tick()
    return arrays


def _drawing_steps(config: ExperimentConfig, count: int) -> int:
    return -(-count // BATCH) * Sizes.of(config).steps


def chunk_of(config: ExperimentConfig, seed: int, style: str, number: int) -> list[tuple[int, CompositionCase]]:
    """The cases of a part with their numbers."""
    size = Sizes.of(config).chunk
    found = [(index, case) for index, case in enumerate(cases_of(config, seed)) if case.style == style]
    return found[number * size : (number + 1) * size]


def arms(config: ExperimentConfig, tick: Tick, seed: int, style: str, number: int) -> Values:
    """Pictures of all arms, seconds and forwards."""
    sizes, trained, chosen = Sizes.of(config), model_of(config), chunk_of(config, seed, style, number)

    def make() -> Arrays:
        noise = [(config.seed + seed) * 100_000 + index for index, _ in chosen]
        images, cost = run_arms(trained, [case for _, case in chosen], noise, sizes.steps, tick)
        return {
            **{f"images {arm}": found for arm, found in images.items()},
            "images background": np.stack([case.placement.background for _, case in chosen]),
            "images answer": np.stack([case.answer for _, case in chosen]),
            **{f"seconds {arm}": np.array(value) for arm, value in cost.seconds.items()},
            **{f"forwards {arm}": np.array(value) for arm, value in cost.forwards.items()},
        }

    key = {"weights": weights_of(config), "settings": SETTINGS, "steps": sizes.steps, "cases": sizes.cases}
    arrays, old = keep(config, part_name(seed, style, number), {**key, "chunk": sizes.chunk}, make)
    for _ in range(model_calls(style, sizes.steps) if old else 0):
        tick()
    return arrays


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """Two readers, the drawings of prompts, and the arms by seed, style and chunk."""
    sizes, trained = Sizes.of(config), model_of(config)
    found = {name: ExperimentPart(partial(reader, name=name), sizes.learned) for name in READERS}
    count = len(prompts_of(config, trained))
    found[PROMPTS] = ExperimentPart(drawing, _drawing_steps(config, count))
    styles = list(trained.data["styles"])
    for seed in range(sizes.seeds):
        for at, style in enumerate(styles):
            for number in range(sizes.chunks(at, len(styles))):
                run = partial(arms, seed=seed, style=style, number=number)
                steps = model_calls(style, sizes.steps)
                found[part_name(seed, style, number)] = ExperimentPart(run, steps)
    return found


EXPERIMENT = Experiment(
    "prime-composer",
    "P",
    "PrimeComposer: objects composed into pictures",
    parts,
    judge,
    draw,
    trained="a run of deepspeed train/main.py --config diffusion-emoji.yaml, such as runs/diffusion-emoji",
    optional=(MORE_SEEDS,),
)
