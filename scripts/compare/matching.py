"""Matches variants to equal parameters or equal training FLOPs, with the width of the MLP's hidden layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from attnzoo.models import DecoderConfig, build_shapes

By = Literal["parameters", "flops"]
TOLERANCE = 0.01


@dataclass(frozen=True)
class Match:
    """A variant's matched width. deviation: of the matched quantity from the target, relative."""

    variant: str
    mlp_dim: int
    parameters: int
    train_flops_per_token: float
    deviation: float


def sizes(config: DecoderConfig, length: int) -> tuple[int, float]:
    """(parameters, training FLOPs per token in sequences of `length` tokens: three times those of a forward pass)."""
    model = build_shapes(config)
    return model.num_parameters(), 3 * model.cost(1, length, length).flops / length


def match(configs: dict[str, Callable[[int], DecoderConfig]], by: By, base: int, length: int) -> dict[str, Match]:
    """A `Match` for each variant. configs: build the model of a variant for a hidden width.

    The target is the largest variant with the hidden width `base`, so that no variant is narrower than the paper's.
    Both quantities are linear in the width, so that two widths determine the matched one. Raises ValueError if a
    variant cannot be matched within 1 %.
    """

    def quantity(name: str, width: int) -> float:
        return sizes(configs[name](width), length)[by == "flops"]

    at_base = {name: quantity(name, base) for name in configs}
    target = max(at_base.values())
    matches = {}
    for name, build in configs.items():
        slope = quantity(name, base + 1) - at_base[name]
        width = base + round((target - at_base[name]) / slope)
        parameters, flops = sizes(build(width), length)
        deviation = (flops if by == "flops" else parameters) / target - 1
        if abs(deviation) > TOLERANCE:
            raise ValueError(
                f"{name} with mlp_dim={width} is {deviation:+.1%} away from {target:,.0f} {by}; matching needs "
                f"{TOLERANCE:.0%}: raise model_dim or num_layers"
            )
        matches[name] = Match(name, width, parameters, flops, deviation)
    return matches
