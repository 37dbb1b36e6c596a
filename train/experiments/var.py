"""Experiment V: attention of sinks given to the picture (visual attention redistribution, Kang et al. 2025, arXiv
2503.03321), with a model of `configs/vlm-small.yaml` or `configs/vlm-smollm2.yaml`.

First it is measured whether the model has sinks, and in which layers; then the same questions are answered with and
without edits. A model without sinks has nothing to take from: it only answers unedited and with the published
threshold, which takes most tokens of a small model for sinks.
"""

import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnzoo.attention.edits import Edits, Sinks
from attnzoo.vision.questions import KINDS, Baselines, SceneQuestion, evaluation_questions
from attnzoo.vision.redistribution import FoundSinks, is_massive, layer_inputs
from attnzoo.vision.redistribution import sinks_of as measured
from attnzoo.vision.scenes import Scene, SceneWorld
from attnzoo.vision.trained_pictures import TrainedPictures, load_pictures
from train.data.scenes import asked_about
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Tick, Values
from train.experiments.var_arms import (
    ARMS,
    FIXED,
    OTHERS_HIDDEN,
    UNEDITED,
    VAR,
    fixed,
    others_hidden,
)
from train.experiments.var_figure import draw
from train.experiments.var_judge import SINKS, judge

ASKED = tuple(kind for kind in KINDS if kind not in ("text", "names"))
"""Kinds of questions: those that need the picture and have one short answer."""
QUESTIONS, QUICK_QUESTIONS = 500, 2
"""Of each kind: 4,000 show one point of difference where 5 % of the answers change."""
MORE_QUESTIONS = "more-questions"
"""Without them a quarter is asked: of a large language model, whose 12 arms take an hour then."""
BATCH = 32
PICTURES_LOOKED_AT = 64
LEARNED_FROM = 1500


def model_of(config: ExperimentConfig) -> TrainedPictures:
    """The trained model."""
    assert config.trained is not None
    return _loaded(config.trained)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> TrainedPictures:
    return load_pictures(path)


def world_of(config: ExperimentConfig) -> SceneWorld:
    """The scenes that it has learned."""
    return SceneWorld.of(model_of(config).data)


def questions(config: ExperimentConfig) -> list[tuple[Scene, SceneQuestion]]:
    """What is asked, kind by kind, each about a scene of its own."""
    asked = QUESTIONS // 4 if MORE_QUESTIONS in config.without else QUESTIONS
    count = QUICK_QUESTIONS if config.quick else asked
    world = world_of(config)
    return [pair for kind in ASKED for pair in evaluation_questions(world, "standard", kind, count, config.seed + 1)]


def sinks_of(config: ExperimentConfig) -> FoundSinks:
    """The language model's sinks."""
    return measured(model_of(config), config.seed + 2)


def places_of(trained: TrainedPictures) -> range:
    """Where the picture stands in a prompt."""
    end = len(trained.reader.begin)
    return range(end - trained.pictures.config.tokens, end)


@torch.no_grad()
def states_of(config: ExperimentConfig) -> list[list[Tensor]]:
    """x_TD as it enters each layer, of some questions of every kind."""
    trained, world, asked = model_of(config), world_of(config), questions(config)
    some = asked[:: -(-len(asked) // PICTURES_LOOKED_AT)]

    def read() -> None:
        for scene, question in some:
            image = torch.from_numpy(world.image(scene)).permute(2, 0, 1)[None]
            trained.model(torch.tensor([trained.reader.prompt(question.text)]), image)

    return layer_inputs(trained.model.decoder, read)


def picture_sinks(config: ExperimentConfig) -> dict[int, int]:
    """How many of a picture's tokens are sinks in each layer with sinks, the mean rounded up."""
    return _counted(config.trained, config.quick, config.seed, config.without)


@lru_cache(maxsize=1)
def _counted(trained: Path | None, quick: bool, seed: int, without: tuple[str, ...]) -> dict[int, int]:
    config = ExperimentConfig(trained=trained, quick=quick, seed=seed, without=without)
    found, states, places = sinks_of(config), states_of(config), places_of(model_of(config))
    counts: dict[int, int] = {}
    for each in found.layers[:-1]:
        if each.tau is not None:
            sinks = Sinks(found.channels, each.tau)
            inside = [int(sinks.found(x_TD[None, places.start : places.stop]).sum()) for x_TD in states[each.layer]]
            counts[each.layer] = math.ceil(sum(inside) / len(inside))
    return counts


def sinks(config: ExperimentConfig, tick: Tick) -> Values:
    """What each layer says of sinks, and how many of the picture's tokens are sinks or massive there."""
    trained, found, world = model_of(config), sinks_of(config), world_of(config)
    places, asked, states, counts = places_of(trained), questions(config), states_of(config), picture_sinks(config)
    inside = slice(places.start, places.stop)
    tick()
    layers = [
        {
            "layer": each.layer,
            "first": each.first,
            "others": each.others,
            "raw": each.raw,
            "median": each.median,
            "reason": each.reason,
            "sinks": counts.get(each.layer, 0),
            "picture": float(torch.cat([is_massive(x_TD)[inside] for x_TD in states[each.layer]]).float().mean()),
        }
        for each in found.layers
    ]
    learned = [
        question
        for index in range(50 if config.quick else LEARNED_FROM)
        for question in asked_about(world, world.scene("train", config.seed + 3, index), 6, 0.0)
    ]
    known = Baselines(learned)
    return {
        "channels": list(found.channels),
        "layers": layers,
        "kinds": [question.kind for _, question in asked],
        "majority": [known.majority(question) == question.answer for _, question in asked],
        "blind": [known.blind(question) == question.answer for _, question in asked],
    }


def arm(config: ExperimentConfig, tick: Tick, name: str) -> Values:
    """Which questions are answered rightly."""
    trained, world = model_of(config), world_of(config)
    found = sinks_of(config)
    dim = trained.language_model.model.config.model_dim
    pairs, right = questions(config), []
    for first in range(0, len(pairs), BATCH):
        if name == OTHERS_HIDDEN:  # others in each batch
            random = np.random.default_rng((config.seed, first))
            items = others_hidden(picture_sinks(config), places_of(trained), random)
        else:
            items = ARMS[VAR](fixed(found, dim)) if name == FIXED else ARMS[name](found)
        edits = Edits(*items) if items else None
        some = pairs[first : first + BATCH]
        images = np.stack([world.image(scene) for scene, _ in some])
        said = trained.answers(images, [question.text for _, question in some], edits=edits)
        right += [text == question.answer for text, (_, question) in zip(said, some, strict=True)]
        tick()
    return {"right": right}


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The sinks, and every arm that there is for this model."""
    has_sinks = any(each.tau is not None for each in sinks_of(config).layers[:-1])
    names = [*(ARMS if has_sinks else [UNEDITED]), FIXED]
    if has_sinks and any(picture_sinks(config).values()):
        names.append(OTHERS_HIDDEN)
    steps = -(-len(questions(config)) // BATCH)
    found = {name: ExperimentPart(partial(arm, name=name), steps) for name in names}
    return {SINKS: ExperimentPart(sinks, 1), **found}


EXPERIMENT = Experiment(
    "var",
    "V",
    "Visual attention redistribution",
    parts,
    judge,
    draw,
    trained="a run of deepspeed train/main.py --config vlm-small.yaml, such as runs/vlm-small",
    optional=(MORE_QUESTIONS,),
)
