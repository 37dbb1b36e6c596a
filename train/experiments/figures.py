"""Figures of the experiments, as PNG files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnzoo.figures import panels, save

Values = dict[str, Any]


def axes_of(columns: int, height: float = 3.6) -> tuple[Any, Any]:
    """(figure, axes) with `columns` panels in a row."""
    figure, axes = panels(1, columns, width=4.6, height=height)
    return figure, axes[0]


def curve(ax: Any, points: Iterable[Iterable[float]], label: str) -> None:
    """Draws a training curve of [step, loss] points."""
    steps, losses = zip(*points, strict=True)
    ax.plot(steps, losses, label=label, linewidth=1.2)


def draw_training(values: Values, directory: Path) -> Path:
    """Draws training losses of one and two layers with those of the solvers, the interpolation, and softmax heads."""
    one, two = values["one layer"], values["two layers"]
    figure, axes = axes_of(4 if "mixed" in one else 2)
    curve(axes[0], one["curve"], "one layer")
    axes[0].axhline(one["gd"], linestyle="--", color="black", label="one step of GD")
    curve(axes[1], two["curve"], "two recurrent layers")
    axes[1].axhline(two["gd"]["loss"], linestyle="--", color="black", label="GD, two steps")
    axes[1].axhline(two["gd++"]["loss"], linestyle=":", color="black", label="GD++, two steps")
    axes[0].set(title="one layer", yscale="log")
    axes[1].set(title="two recurrent layers", ylim=(0.3, 2.0), yscale="log")
    if "mixed" in one:
        axes[2].plot([0, 0.25, 0.5, 0.75, 1], one["mixed"], "o-")
        axes[2].set(title="between constructed and trained", xlabel="share of the trained weights", ylabel="loss")
        for heads in ("softmax, 1 head", "softmax, 2 heads"):
            curve(axes[3], values[heads]["curve"], heads)
        axes[3].axhline(one["gd"], linestyle="--", color="black", label="one step of GD")
        axes[3].set(title="softmax instead", ylim=(0.7, 2.0))
    for index, ax in enumerate(axes):
        if index != 2:
            ax.set(xlabel="training step", ylabel="loss")
            ax.legend(fontsize=8)
    return save(figure, directory / "icl_training.png")


def draw_shifts(values: Values, directory: Path) -> Path:
    """Draws losses on other distributions, of the trained layer and of one step of GD."""
    rows = values["one layer"]["shifts"]
    figure, (ax,) = axes_of(1, 4.2)
    figure.set_size_inches(10, 4.2)
    places = range(len(rows))
    ax.plot(places, [row["gd"] for row in rows], "ks", markersize=7, fillstyle="none", label="one step of GD")
    ax.plot(places, [row["trained"] for row in rows], "o", markersize=4, label="trained layer")
    ax.set_xticks(places, [row["tasks"] for row in rows], rotation=50, ha="right", fontsize=8)
    ax.set(yscale="log", ylabel="loss", title="other tasks than those trained on")
    ax.legend()
    return save(figure, directory / "icl_out_of_distribution.png")


def draw_iterations(values: Values, directory: Path) -> Path:
    """Draws losses of the layer applied repeatedly to its own output."""
    rows = values["one layer"]["applied"]
    figure, (ax,) = axes_of(1)
    times = [row["applications"] for row in rows]
    ax.plot(times, [row["damped gd"] for row in rows], "ks--", fillstyle="none", label="damped GD")
    ax.plot(times, [row["trained"] for row in rows], "o-", label="trained layer, applied again")
    ax.set(xscale="log", yscale="log", xlabel="applications, damped by .75", ylabel="loss")
    ax.legend()
    return save(figure, directory / "icl_iterations.png")


def draw_pairs(values: Values, directory: Path) -> Path:
    """Draws loss and first-layer sensitivities with x and y as separate tokens, and sine regression."""
    pairs = values["pairs"]
    figure, axes = axes_of(3)
    curve(axes[0], pairs["curve"], "softmax, then linear layer")
    axes[0].axhline(pairs["gd"], linestyle="--", color="black", label="one step of GD")
    axes[0].set(title="x and y as tokens of their own", ylabel="loss")
    for name, label in (("own", "own token"), ("next", "next token (its y)"), ("others", "each other token")):
        axes[1].plot([p["step"] for p in pairs["probes"]], [p[name] for p in pairs["probes"]], label=label)
    axes[1].set(title="what layer 1 depends on", ylabel="gradient norm")
    for name in (name for name in values if name.startswith("sine, ")):
        curve(axes[2], values[name]["curve"], name.replace("sine, ", ""))
    axes[2].set(title="sine regression behind an MLP", yscale="log", ylabel="loss")
    for ax in axes:
        ax.set_xlabel("training step")
        ax.legend(fontsize=8)
    return save(figure, directory / "icl_pairs.png")


def draw_one_step(values: Values, directory: Path) -> Path:
    """Draws loss / L* during training, and entries of learned against best preconditioners."""
    figure, axes = axes_of(2, 4.2)
    for name, part in values.items():
        curve(axes[0], [[step, loss / part["optimum"]] for step, loss in part["curve"]], name)
        learned, best = ([entry for row in part[key] for entry in row] for key in ("learned", "gamma"))
        axes[1].plot(best, learned, "o", markersize=4, label=name)
    low, high = axes[1].get_xlim()
    axes[1].plot([low, high], [low, high], "k--", linewidth=0.8)
    axes[0].axhline(1.0, linestyle="--", color="black")
    axes[0].set(xlabel="training step", ylabel="loss / L*", ylim=(0.8, 2.5), title="training, mean of four starts")
    axes[1].set(xlabel="entry of the best preconditioner", ylabel="learned entry", title="and learns its matrix")
    axes[0].legend(fontsize=7)
    return save(figure, directory / "one_step_gd.png")


def draw_softmax_regression(values: Values, directory: Path) -> Path:
    """Draws |b~ - b| relative to its bounds, and losses of the trained head and of the steps."""
    settings = {name: part for name, part in values.items() if "losses" in part}
    figure, axes = axes_of(1 + len(settings))
    instances = values["closeness"]["instances"]
    for bound, label in (("tight", "R/2"), ("paper", "the paper's M")):
        axes[0].plot([r["radius"] for r in instances], [max(r[bound], 1e-90) for r in instances], ".", label=label)
    axes[0].axhline(1.0, color="black", linewidth=0.8)
    axes[0].set(yscale="log", xlabel="R", ylabel="|b~ - b| / bound", title="how much of a bound is used")
    axes[0].legend(fontsize=8)
    for ax, (name, part) in zip(axes[1:], settings.items(), strict=True):
        curve(ax, part["curve"], "trained head")
        for style, other in zip(
            (":", "-.", "--", (0, (1, 4))), ("gd", "linearised", "construction", "null"), strict=True
        ):
            ax.axhline(part["losses"][other], linestyle=style, color="black", label=other)
        ax.set(title=name, xlabel="training step", ylabel="loss", yscale="log")
        ax.legend(fontsize=8)
    return save(figure, directory / "softmax_regression.png")


def draw_depth(values: Values, directory: Path) -> Path:
    """Draws the loss by number of layers or steps."""
    figure, (ax,) = axes_of(1, 4.4)
    figure.set_size_inches(6.4, 4.6)
    for name, losses in values["solvers"].items():
        ax.plot(range(1, len(losses) + 1), losses, "--", linewidth=1, label=name)
    for name, style in (("looped", "o-"), ("stacked", "s-")):
        losses = values[name]["loss"]
        ax.plot(range(1, len(losses) + 1), losses, style, markersize=4, label=f"trained, {name}")
    ax.set(yscale="log", xlabel="layers, or steps", ylabel="loss", title="linear attention by depth")
    ax.set_xticks(range(1, len(losses) + 1))
    ax.legend(fontsize=8)
    return save(figure, directory / "icl_depth.png")


def draw_variants(values: Values, directory: Path) -> Path:
    """Draws the distances of every variant's predictions to every algorithm's."""
    found = {tuple(name.rsplit(" ", 2)): part for name, part in values.items() if "distances" in part}
    tasks = list(dict.fromkeys(name for _, name, _ in found))
    figure, axes = axes_of(len(tasks), 4.4)
    for ax, name in zip(axes, tasks, strict=True):
        rows = {f"{kind}, {depth} layer{'s' * (depth != '1')}": p for (kind, t, depth), p in found.items() if t == name}
        labels = list(next(iter(rows.values()))["distances"])
        grid = [[max(part["distances"][label], 1e-6) for label in labels] for part in rows.values()]
        import matplotlib.colors as colours

        image = ax.imshow(grid, norm=colours.LogNorm(1e-3, 1.0), cmap="viridis_r", aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(
                    x,
                    y,
                    f"{value:.2g}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.1 else "black",
                )
        ax.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
        ax.set_yticks(range(len(rows)), rows, fontsize=8)
        ax.grid(visible=False)
        ax.set_title(f"{name} tasks")
    figure.colorbar(image, ax=list(axes), label="squared distance of predictions / E y^2")
    return save(figure, directory / "icl_variants.png")
