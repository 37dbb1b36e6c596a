"""The figure of experiment V."""

from pathlib import Path

import numpy as np

from attnzoo.figures import save
from attnzoo.intervals import bootstrap_mean
from train.experiments.base import Values
from train.experiments.figures import axes_of
from train.experiments.var_arms import UNEDITED
from train.experiments.var_judge import SINKS


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws how far the first token stands out by layer, and each arm's accuracy less the unedited one's."""
    layers = values[SINKS]["layers"]
    figure, axes = axes_of(2, 3.8)
    numbers = [each["layer"] for each in layers]
    axes[0].plot(numbers, [each["first"] for each in layers], "o-", markersize=3, label="first token")
    axes[0].plot(numbers, [each["others"] for each in layers], "o-", markersize=3, label="nearly all others")
    axes[0].set(xlabel="layer", ylabel="largest of the channels / root mean square", title="sinks by layer")
    axes[0].locator_params(axis="x", integer=True)
    axes[0].legend(fontsize=8)
    arms = [name for name in values if name not in (SINKS, UNEDITED)]
    plain = np.array(values[UNEDITED]["right"], dtype=float)
    for place, name in enumerate(arms):
        difference = np.array(values[name]["right"], dtype=float) - plain
        low, high = bootstrap_mean(difference)
        axes[1].plot([100 * low, 100 * high], [place, place], color="black", linewidth=1)
        axes[1].plot(100 * difference.mean(), place, "o", markersize=6)
    axes[1].axvline(0.0, color="black", linestyle="--", linewidth=1)
    axes[1].set_yticks(range(len(arms)), arms)
    axes[1].set(xlabel="accuracy less unedited, points, 95 %", title="the same questions", ylim=(len(arms) - 0.4, -0.6))
    return [save(figure, directory / "var.png")]
