"""Draws quality against bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.figures import panels, save
from scripts.caches.protocol import CONDITIONS


def plot_quality(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draws rows of `table.quality_row`: a row of panels for each table, with a panel for each condition and one for
    the mean, and a curve for each policy. Returns the path of the PNG file."""
    tables = list(dict.fromkeys(row["table"] for row in rows))
    columns = (*CONDITIONS, "mean")
    figure, axes = panels(len(tables), len(columns), width=4, height=3.6, share_y=True)
    for line, table in zip(axes, tables, strict=True):
        mine = [row for row in rows if row["table"] == table]
        full = next(row for row in mine if row["policy"] == "full")
        for ax, column in zip(line, columns, strict=True):
            _panel(ax, mine, full, column)
            ax.set(xlabel="bytes over the full cache's", title=f"{table}: {column}")
        line[0].set_ylabel("accuracy")
        line[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return save(figure, path)


def _panel(ax: Any, rows: Sequence[dict[str, Any]], full: dict[str, Any], column: str) -> None:
    policies = dict.fromkeys(row["policy"] for row in rows if row is not full)
    for number, policy in enumerate(policies):
        points = sorted((row["bytes"] / full["bytes"], row[column]) for row in rows if row["policy"] == policy)
        control = policy in ("streaming", "random_tokens", "random_channels")
        style = "--" if control else (":" if policy.endswith("Press") else "-")
        marker = "os"[number // 10 % 2]  # the ten colours repeat
        ax.plot(*zip(*points, strict=True), marker=marker, linestyle=style, label=policy)
    ax.axhline(full[column], color="gray", linewidth=1, label="full")
    ax.set_ylim(-0.03, 1.03)
