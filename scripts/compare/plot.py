"""Draws the figures of a comparison."""

from pathlib import Path

from attnzoo.figures import panels, save
from scripts.compare.compare import TITLES, Results
from scripts.compare.comparison import Comparison
from scripts.compare.statistics import mean_interval


def plot_all(comparison: Comparison, results: Results, directory: Path) -> list[Path]:
    """Draws the figures for the comparison's tables; returns the PNG files."""
    tables = [table for table in TITLES if table in comparison.config.tables]
    if not tables:
        return []
    return [
        _quality(comparison, results, tables, directory / "compare_quality.png"),
        _positions(comparison, results, tables[0], directory / "compare_positions.png"),
        _trade(comparison, results, tables[0], directory / "compare_cost.png"),
    ]


def _quality(comparison: Comparison, results: Results, tables: list[str], path: Path) -> Path:
    """Bits per character with intervals, a panel for each matched table."""
    figure, (axes,) = panels(1, len(tables))
    variants = comparison.config.variants
    for ax, table in zip(axes, tables, strict=True):
        for place, variant in enumerate(variants):
            values = [r["bits_per_character"] for r in results.of(table, variant)]
            mean, half = mean_interval(values)
            ax.errorbar(place, mean, yerr=None if len(values) < 2 else half, fmt="o", capsize=5)
            ax.plot([place] * len(values), values, "_", color="gray", markersize=10)
        ax.set_xticks(range(len(variants)), variants)
        ax.set(title=TITLES[table], ylabel="validation bits per character (mean, 95 % interval)")
    return save(figure, path)


def _positions(comparison: Comparison, results: Results, table: str, path: Path) -> Path:
    """Loss against position in windows of four trained lengths."""
    figure, ((ax,),) = panels(1, 1)
    for variant in comparison.config.variants:
        runs = results.of(table, variant)
        curves = zip(*(r["loss_by_position"] for r in runs), strict=True)
        ax.plot(runs[0]["positions"], [sum(values) / len(values) for values in curves], label=variant)
    ax.axvline(comparison.config.segment, linestyle="--", color="gray", linewidth=1)
    ax.set(xscale="log", xlabel="position in the window (dashed: trained length)", ylabel="nats per character")
    ax.set_title(TITLES[table])
    ax.legend()
    return save(figure, path)


def _trade(comparison: Comparison, results: Results, table: str, path: Path) -> Path:
    """Quality against the time and the memory of a training step."""
    figure, (axes,) = panels(1, 2)
    for variant in comparison.config.variants:
        mean, half = mean_interval([r["bits_per_character"] for r in results.of(table, variant)])
        speed = results.speeds[table, variant]
        for ax, cost in zip(axes, (speed.train_ms, speed.peak_bytes / 2**20), strict=True):
            ax.errorbar(cost, mean, yerr=None if half != half else half, fmt="o", capsize=4, label=variant)
    for ax, label in zip(axes, ("training step, ms", "peak of a training step, MiB"), strict=True):
        ax.set(xlabel=label, ylabel="validation bits per character", title=TITLES[table])
        ax.legend()
    return save(figure, path)
