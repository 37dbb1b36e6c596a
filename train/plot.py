"""Draws loss.png: training and validation loss over steps."""

from collections.abc import Mapping
from pathlib import Path

from attnzoo.figures import panels, save
from train.data.tokens import bits_per_byte
from train.metrics import read_metrics


def plot_losses(
    run_dir: Path, train_bytes_per_token: float | None, title: str, baselines: Mapping[str, float] | None = None
) -> Path:
    """Draws the loss curves of a run, and baselines by label as lines; returns the figure's path.

    train_bytes_per_token: losses in nats per token of so many bytes are drawn in bits per byte; None: as they are.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    figure, ((axes,),) = panels(1, 1, width=7, height=4.5)
    for kind, label, style in (("train", "training", "-"), ("eval", "validation", "o-")):
        chosen = [r for r in records if r["kind"] == kind and r["loss"] is not None]
        steps = [r["step"] for r in chosen]
        values = [r["loss"] for r in chosen]
        if train_bytes_per_token is not None:
            values = [r.get("bits_per_byte") or bits_per_byte(r["loss"], train_bytes_per_token) for r in chosen]
        axes.plot(steps, values, style, label=label, linewidth=1, markersize=3)
    for label, value in (baselines or {}).items():
        axes.axhline(value, linestyle="--", linewidth=1, color="gray")
        # The label stands beside the axes, where it does not cover the curves.
        axes.text(1.01, value, f"{label}: {value:.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set(xlabel="step", ylabel="loss" if train_bytes_per_token is None else "bits per byte", title=title)
    axes.legend()
    return save(figure, run_dir / "loss.png")
