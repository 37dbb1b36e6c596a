"""What is measured of a trained model: how many cases and prompts, and which."""

from dataclasses import dataclass

from attnzoo.vision.trained_diffusion import TrainedDiffusion, load_diffusion
from train.experiments.base import ExperimentConfig
from train.experiments.composition.arms import SETTINGS
from train.experiments.composition.cases import CompositionCase, make_cases, world_of
from train.experiments.composition.gate import GatePrompt, prompts

MORE_SEEDS = "more-seeds"
"""The optional group: all seeds but the first."""


@dataclass(frozen=True)
class Sizes:
    """seeds: sets of cases, of `cases` each; chunk: cases of one style in a part. steps: of inversion and generation.
    prompts: of every kind and style. learned, tested: training steps of a reader, and pictures that it is tested on.
    known: cases on which the metrics are tested."""

    seeds: int = 3
    cases: int = 256
    chunk: int = 32
    steps: int = 20
    prompts: int = 4
    learned: int = 600
    tested: int = 1600
    known: int = 200

    @classmethod
    def of(cls, config: ExperimentConfig) -> "Sizes":
        """With `quick` as few as there can be."""
        if config.quick:
            return cls(1, cases=4, chunk=1, steps=2, prompts=1, learned=2, tested=48, known=4)
        return cls(seeds=1 if MORE_SEEDS in config.without else cls.seeds)

    def chunks(self, style: int, styles: int) -> int:
        """Parts that the cases of one style make up in a seed, of `styles` that come in turn."""
        return -(-len(range(style, self.cases, styles)) // self.chunk)


def part_name(seed: int, style: str, number: int) -> str:
    """The name of a part with a chunk of cases."""
    return f"seed {seed}, {style}, {number}"


def model_of(config: ExperimentConfig) -> TrainedDiffusion:
    """The trained model. Raises ValueError."""
    assert config.trained is not None
    trained = load_diffusion(config.trained)
    unknown = [style for style in trained.data.get("styles", ["none"]) if style not in SETTINGS]
    if unknown:
        raise ValueError(f"--run={config.trained}: composition has no settings for the style {unknown[0]!r}")
    return trained


def cases_of(config: ExperimentConfig, seed: int) -> list[CompositionCase]:
    """The cases of one seed; styles come in turn."""
    data = model_of(config).data
    return make_cases(world_of(data), data["styles"], config.seed + seed, Sizes.of(config).cases)


def prompts_of(config: ExperimentConfig, trained: TrainedDiffusion) -> list[GatePrompt]:
    """The prompts of the gate."""
    names = world_of(trained.data).names
    return prompts(names, trained.data["styles"], config.seed, Sizes.of(config).prompts)
