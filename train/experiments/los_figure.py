"""The figure of experiment L."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from attnzoo.figures import save
from train.experiments.base import Values
from train.experiments.figures import axes_of
from train.experiments.los_judge import ATTENTION, MODELS, pooled

SHOWN_HOURS = (0, 6, 12, 24, 36, 48, 72, 96, 120, 144, 169)
RESAMPLES = 200


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws kappa with intervals, the mean absolute deviation by time, and buckets that were told against true ones."""
    found = pooled(values)
    figure, axes = axes_of(3, 3.8)
    for place, name in enumerate(MODELS):
        of = found[name].interval("kappa", RESAMPLES)
        axes[0].plot([of.low, of.high], [place, place], color="black", linewidth=1)
        axes[0].plot(of.value, place, "o", markersize=6)
    axes[0].set_yticks(range(len(MODELS)), MODELS)
    axes[0].set(xlabel="linear kappa, 95 % over stays", title="all hours", ylim=(-0.6, len(MODELS) - 0.4))
    middles = [(first + end) / 2 for first, end in pairwise(SHOWN_HOURS)]
    for name in MODELS:
        each = found[name]
        error_K, part_K = np.abs(each.typical_K - each.remaining_K), np.searchsorted(SHOWN_HOURS, each.hours_K, "right")
        shown = [
            error_K[part_K == part].mean() if (part_K == part).any() else np.nan for part in range(1, len(SHOWN_HOURS))
        ]
        axes[1].plot(middles, shown, "o-", markersize=3, label=name)
    axes[1].set(xlabel="hours since admission", ylabel="mean absolute deviation, hours", title="by time")
    axes[1].legend(fontsize=8)
    one = found[ATTENTION]
    table = np.zeros((one.categories, one.categories))
    np.add.at(table, (one.true_K, one.told_K), 1)
    image = axes[2].imshow(table / np.maximum(table.sum(axis=1, keepdims=True), 1), cmap="viridis", origin="lower")
    axes[2].set(xlabel=f"bucket told by {ATTENTION}", ylabel="true bucket", title="share of a true bucket's hours")
    axes[2].grid(visible=False)
    figure.colorbar(image, ax=axes[2])
    return [save(figure, directory / "tscan_los.png")]
