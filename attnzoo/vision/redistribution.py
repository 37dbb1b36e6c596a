"""Visual attention redistribution (VAR): attention that goes to sinks is given to the picture, as a declared edit.

Kang et al. 2025, arXiv 2503.03321. Heads that look at the picture give a share `p` of the weight of all sinks to those
tokens of the picture that are no sinks. Which tokens are sinks is seen in a few channels of hidden states, which are
`massive` (Sun et al. 2024, arXiv 2402.17762); which channels, and from which value on, is measured for each model and
layer (`find_sinks`): a fixed threshold makes nearly every token of a small model a sink. Where nothing sets the first
token apart, there are no sinks to take from, and the edit is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.edits import After, HeadFilter, Item, Move, Sinks, Where
from attnzoo.models import DecoderLM
from attnzoo.vision.questions import training_questions
from attnzoo.vision.scenes import SceneWorld
from attnzoo.vision.trained_pictures import TrainedPictures

LEAST_RAW, TIMES_MEDIAN = 100.0, 1000.0
"""A massive number is larger than both: than the first, and than the second times the median of its layer."""
LEAST_GAP = 1.2
"""How many times as large the first token must be as nearly all others are, |x_c| / rms(x)."""
NEARLY_ALL = 0.999
SEVERAL = 0.5
"""Channels count that are at least so large, as a part of the largest."""
TEXTS, TEXT_TURNS = 16, 5
"""Texts of turns by which `sinks_of` measures."""


@dataclass(frozen=True)
class LayerSinks:
    """What hidden states say as they enter a layer. first: the least |x_c| / rms(x) of first tokens, in the largest of
    the channels; others: what nearly all other tokens stay below; raw: the least |x_c| of first tokens; median: of
    all numbers, without sign. tau: from which value on a token is a sink; None where `reason` says why there are
    none."""

    layer: int
    first: float
    others: float
    raw: float
    median: float
    tau: float | None
    reason: str = ""


@dataclass(frozen=True)
class FoundSinks:
    """The sinks of a model: in which channels they are massive, and what each layer says."""

    channels: tuple[int, ...]
    layers: tuple[LayerSinks, ...]


@torch.no_grad()
def find_sinks(model: DecoderLM, texts: Sequence[Sequence[int]]) -> FoundSinks:
    """Runs the model over texts (token ids, without pictures, whose tokens may be sinks themselves).

    Channels are the largest of first tokens in the middle third of the layers. A layer has sinks where first tokens
    are massive there, and `LEAST_GAP` times as large as nearly all others; its threshold is in the middle of the gap.
    Raises ValueError for texts that hold fewer than two tokens.
    """
    if not texts or any(len(text) < 2 for text in texts):
        raise ValueError("texts: give one text or more, of at least two tokens each, to measure the sinks of a model")
    device = next(model.parameters()).device

    def read() -> None:
        for text in texts:
            model.hidden(torch.tensor([list(text)], device=device))

    states = layer_inputs(model, read)
    middle = states[len(states) // 3 : max(len(states) // 3 + 1, 2 * len(states) // 3)]
    first_D = torch.stack([_relative(x_TD[:1])[0] for layer in middle for x_TD in layer]).mean(0)
    channels = tuple((first_D >= SEVERAL * first_D.max()).nonzero()[:, 0].tolist())
    return FoundSinks(channels, tuple(_layer(number, layer, channels) for number, layer in enumerate(states)))


def sinks_of(trained: TrainedPictures, seed: int = 2) -> FoundSinks:
    """`find_sinks` of a model of pictures, by turns about words alone, of the form that it has learned. Raises
    ValueError where the font of its scenes is not installed."""
    world = SceneWorld.of({**trained.data, "held_out_font": None})
    scenes = [world.scene("train", seed, index) for index in range(TEXTS)]
    asked = [training_questions(world, scene, TEXT_TURNS, 1.0, (*scene.seed, 3)) for scene in scenes]
    return find_sinks(trained.language_model.model, [trained.reader.words(questions) for questions in asked])


def layer_inputs(model: DecoderLM, read: Callable[[], object]) -> list[list[Tensor]]:
    """x_TD of every sequence that the model reads in a call of `read`, one at a time, as it enters each layer."""
    states: list[list[Tensor]] = [[] for _ in model.blocks]

    def keep(number: int) -> Any:
        return lambda _, given: states[number].append(given[0][0].float())

    hooks = [block.register_forward_pre_hook(keep(number)) for number, block in enumerate(model.layers())]
    try:
        read()
    finally:
        for hook in hooks:
            hook.remove()
    return states


def is_massive(x_TD: Tensor) -> Tensor:
    """massive_T (bool): tokens that have a massive number, by the median of their own layer and sequence."""
    return x_TD.abs().amax(-1) > max(LEAST_RAW, TIMES_MEDIAN * float(x_TD.abs().median()))


def _relative(x_TD: Tensor) -> Tensor:
    """|x| / rms(x)."""
    return x_TD.abs() / x_TD.pow(2).mean(-1, keepdim=True).sqrt()


def _layer(number: int, layer: list[Tensor], channels: tuple[int, ...]) -> LayerSinks:
    phi = [_relative(x_TD)[:, channels].amax(-1) for x_TD in layer]
    first = min(float(x_T[0]) for x_T in phi)
    others = float(torch.cat([x_T[1:] for x_T in phi]).quantile(NEARLY_ALL))
    raw = min(float(x_TD[0, channels].abs().max()) for x_TD in layer)
    median = float(torch.cat([x_TD.abs().flatten() for x_TD in layer]).median())
    reason = ""
    if raw <= LEAST_RAW or raw <= TIMES_MEDIAN * median:
        reason = f"no massive activation: the first token has {raw:.4g}, the median is {median:.3g}"
    elif first < LEAST_GAP * others:
        reason = f"no gap: the first token has {first:.3g} times its root mean square, others up to {others:.3g}"
    return LayerSinks(number, first, others, raw, median, None if reason else (first + others) / 2, reason)


def redistribution(
    sinks: FoundSinks, *, p: float = 0.6, rho: float = 0.8, least: float = 0.2, image: str = "image"
) -> list[Item]:
    """The edits of VAR, one for each layer with sinks but the last.

    p: the share of the sinks' weight that is given. A head is changed where the picture has at least `least` of its
    weight, and of that the picture's tokens without sinks at least the part `rho`. image: the name of the picture's
    span. Queries are all tokens after the picture, generated ones too. Raises ValueError where no layer has sinks.
    """
    found = {each.layer: Sinks(sinks.channels, each.tau) for each in sinks.layers[:-1] if each.tau is not None}
    if not found:
        reasons = sorted({each.reason.partition(":")[0] for each in sinks.layers[:-1] if each.reason})
        raise ValueError(
            f"no layer of this model has sinks whose attention could be redistributed ({', '.join(reasons)}); channels "
            f"{list(sinks.channels)} were looked at"
        )
    heads = HeadFilter(of=image, min_mass=least, min_share=rho)
    return [
        Move(Where(layers=layer, queries=After(image), keys=each), image, p, heads) for layer, each in found.items()
    ]
