"""The one style of figures: panels with a light grid, written as PNG without a display. Needs matplotlib."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any


def require_matplotlib(what: str) -> None:
    """Raises ValueError when matplotlib is not installed. what: the thing that needs it; the message begins with it."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{what} needs matplotlib: install it (it is in the extra `train`), or leave figures out")


def panels(rows: int, columns: int, *, width: float = 5.0, height: float = 4.0, share_y: bool = False) -> Any:
    """(figure, axes[row][column]). width, height: of a panel in inches. share_y: panels of a row share the y scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    """Writes a PNG without date or version, so that equal figures give equal files; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})
    return path
