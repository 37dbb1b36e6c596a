"""The figure of experiment T."""

from pathlib import Path

import numpy as np

from attnzoo.clinical.calibration import calibration_curve
from attnzoo.clinical.metrics import Cuts, decision_curve
from attnzoo.figures import save
from train.experiments.base import Values
from train.experiments.figures import axes_of
from train.experiments.tscan_judge import LIGHTGBM, SEEDS, SPATIAL, TEMPORAL, TSCAN, predictions

SHOWN = (LIGHTGBM, TEMPORAL, SPATIAL, TSCAN, SEEDS)


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws ROC and precision-recall curves, calibration, and net benefit, of all test rows together."""
    stays, models = predictions(values)
    found, labels = {name: stays.pooled(folds) for name, folds in models.items()}, stays.labels
    figure, axes = axes_of(4, 4.2)
    for name in (name for name in SHOWN if name in found):
        cuts = Cuts.of(labels, found[name], np.ones((1, len(labels))))
        axes[0].plot(1 - cuts.specificity()[0], cuts.sensitivity()[0], label=name, linewidth=1.2)
        axes[1].plot(cuts.sensitivity()[0], cuts.precision()[0], label=name, linewidth=1.2)
    for name in (LIGHTGBM, TSCAN):
        curve = calibration_curve(labels, found[name])
        axes[2].plot(curve.predicted, curve.observed, "o-", markersize=4, label=name)
        benefit = decision_curve(labels, found[name])
        axes[3].plot(benefit.thresholds, benefit.model, label=name, linewidth=1.2)
    axes[0].plot([0, 1], [0, 1], "k--", linewidth=0.8)
    axes[0].set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC")
    axes[1].axhline(labels.mean(), color="black", linestyle="--", linewidth=0.8)
    axes[1].set(xlabel="sensitivity", ylabel="precision", title="precision and recall")
    axes[2].plot([0, 1], [0, 1], "k--", linewidth=0.8)
    axes[2].set(xlabel="predicted risk", ylabel="share that died", title="calibration")
    axes[3].plot(benefit.thresholds, benefit.treat_all, "k--", linewidth=0.8, label="act for everybody")
    axes[3].axhline(0.0, color="black", linewidth=0.8, label="for nobody")
    axes[3].set(xlabel="risk from which one acts", ylabel="net benefit", title="decision curve", ylim=(-0.02, None))
    for ax in axes:
        ax.legend(fontsize=7)
    return [save(figure, directory / "tscan.png")]
