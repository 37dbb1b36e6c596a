"""Figures of experiment P: what composition gains and costs, and examples of every arm."""

import re
from pathlib import Path

import numpy as np

from attnzoo.figures import panels, save
from attnzoo.intervals import bootstrap_mean
from attnzoo.vision import FONTS
from train.experiments.base import Values
from train.experiments.composition.arms import ARMS
from train.experiments.composition.scores import BACKGROUND, OBJECT, RANK, SEAM, STYLE
from train.experiments.prime_composer_judge import ANSWER, MEASURED, Measured

AXES = ((OBJECT, STYLE), (RANK, SEAM), (BACKGROUND, STYLE))
"""Pairs of metrics, of which each panel shows one."""
SHOWN = 2
"""Examples of each style."""


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws the means of arms on two axes, and examples."""
    return [_draw_axes(values[MEASURED]["found"], directory), _draw_examples(values, directory)]


def credit(font: str) -> str:
    """Whose emoji a figure shows, which licences ask for; the figure is under the same licence."""
    licence = FONTS[font].licence if font in FONTS else f"licence of the font {Path(font).name}"
    return f"Emoji changed from those of the font. Licence: {licence}"


def _draw_axes(found: Measured, directory: Path) -> Path:
    figure, ((*axes,),) = panels(1, len(AXES), width=4.6, height=3.8)
    for ax, (across, up) in zip(axes, AXES, strict=True):
        for number, arm in enumerate((*ARMS, ANSWER)):
            points = [found.scores[arm][metric] for metric in (across, up)]
            (x, y), bounds = (float(point.mean()) for point in points), [bootstrap_mean(point) for point in points]
            sides = [[[abs(m - low)], [abs(high - m)]] for m, (low, high) in zip((x, y), bounds, strict=True)]
            ax.errorbar(x, y, xerr=sides[0], yerr=sides[1], fmt="o", color=f"C{number}", label=arm, capsize=2)
        ax.set(xlabel=f"{across} (less is better)", ylabel=f"{up} ({'more' if up == STYLE else 'less'} is better)")
    axes[0].legend(fontsize=7)
    return save(figure, directory / "prime_composer_axes.png")


def _draw_examples(values: dict[str, Values], directory: Path) -> Path:
    """Of the first seed the first cases of each style."""
    columns = ("background", *ARMS, "answer")
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    for name, part in values.items():
        found = re.fullmatch(r"seed 0, (\w+), (\d+)", name)
        if found and sum(style == found[1] for style, _ in rows) < SHOWN:
            count = min(SHOWN, len(part["images answer"]))
            rows += [(found[1], {c: part[f"images {c}"][row] for c in columns}) for row in range(count)]
    figure, axes = panels(len(rows), len(columns), width=1.15, height=1.15)
    for (style, images), line in zip(rows, axes, strict=True):
        for column, ax in zip(columns, line, strict=True):
            ax.imshow(images[column], interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
        line[0].set_ylabel(style, fontsize=8)
    for ax, column in zip(axes[0], columns, strict=True):
        ax.set_title(_broken(column), fontsize=7)
    figure.supxlabel(credit(values[MEASURED]["font"]), fontsize=7)
    return save(figure, directory / "prime_composer_examples.png")


def _broken(words: str) -> str:
    """A title in lines of one or two words."""
    parts = words.split()
    return "\n".join(" ".join(parts[at : at + 2]) for at in range(0, len(parts), 2))
