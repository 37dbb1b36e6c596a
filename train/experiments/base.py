"""The structure of an experiment: parts that run in parallel, their judgement, and figures.

A part is a function (config, tick) -> values, with numbers and lists that JSON can hold. `judge` turns the values of
all parts into rows and claims, `draw` turns them into figures.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.report import Claim
from attnzoo.workers import Tick

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """quick: reduce sizes to try the code; the numbers are then no measurement. variant, options: an attention variant
    to use instead of in-context linear attention (icl-gd and depth). data: the place of the data set, for experiments
    that need one; trained: that of a run of train/main.py, likewise. without: names of optional groups of parts that
    are left out."""

    seed: int = 0
    quick: bool = False
    variant: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None
    trained: Path | None = None
    without: tuple[str, ...] = ()

    def steps(self, full: int) -> int:
        """Number of training steps: `full`, or fewer with `quick`."""
        return max(20, full // 25) if self.quick else full

    def tasks(self, full: int) -> int:
        """Number of tasks in a measurement: `full`, or fewer with `quick`."""
        return max(256, full // 16) if self.quick else full


@dataclass(frozen=True)
class ExperimentPart:
    """An independent measurement. steps: how often it calls `tick`."""

    run: Callable[[ExperimentConfig, Tick], Values]
    steps: int


@dataclass
class Judgement:
    """The judged results. rows: each has the key "table" with its table's name. claims: see `attnzoo.report`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def add(self, name: str, expected: float, measured: float, tolerance: float = 0.0, kind: Any = "equal") -> None:
        """Adds a claim."""
        self.claims.append(Claim(name=name, expected=expected, measured=measured, tolerance=tolerance, kind=kind))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Adds the rows of a table."""
        self.rows += [{"table": name, **row} for row in rows]


@dataclass(frozen=True)
class Experiment:
    """An experiment. name: on the command line. letter: begins the names of its claims. parts: returns its parts by
    name. judge: turns values into results, and may add to the values what figures
    need. draw: writes PNG files into a directory and returns their paths. data: the
    data set that it needs, in words; empty: none. trained: the run that it needs, likewise. optional: names of groups
    of parts that may be left out."""

    name: str
    letter: str
    title: str
    parts: Callable[[ExperimentConfig], dict[str, ExperimentPart]]
    judge: Callable[[ExperimentConfig, dict[str, Values]], Judgement]
    draw: Callable[[dict[str, Values], Path], list[Path]]
    data: str = ""
    trained: str = ""
    optional: tuple[str, ...] = ()
