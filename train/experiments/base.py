"""How an experiment is made of parts that run side by side, and what a part hands back.

A part is a function (config, tick) -> values: plain numbers and lists, which JSON can hold. `judge` turns the values
of all parts into rows and claims, `draw` into figures, so that nothing is measured twice and nothing is typed.
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
    """quick: sizes cut down to try the code, no measurement; variant, options: a zoo variant in the place of in-context
    linear attention (icl-gd only)."""

    seed: int = 0
    quick: bool = False
    variant: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def steps(self, full: int) -> int:
        """Training steps of a run of `full` steps."""
        return max(20, full // 25) if self.quick else full

    def tasks(self, full: int) -> int:
        """Tasks of a measurement over `full` tasks."""
        return max(256, full // 16) if self.quick else full


@dataclass(frozen=True)
class ExperimentPart:
    """A measurement of its own. steps: how many times it ticks."""

    run: Callable[[ExperimentConfig, Tick], Values]
    steps: int


@dataclass
class Judgement:
    """rows carry the key "table"; claims as in `attnzoo.report`."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def add(self, name: str, expected: float, measured: float, tolerance: float = 0.0, kind: Any = "equal") -> None:
        """A claim."""
        self.claims.append(Claim(name=name, expected=expected, measured=measured, tolerance=tolerance, kind=kind))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows of a table."""
        self.rows += [{"table": name, **row} for row in rows]


@dataclass(frozen=True)
class Experiment:
    """name: on the command line; letter: of its claims; parts by name; judge; draw(values, directory) -> PNG files."""

    name: str
    letter: str
    title: str
    parts: Callable[[ExperimentConfig], dict[str, ExperimentPart]]
    judge: Callable[[ExperimentConfig, dict[str, Values]], Judgement]
    draw: Callable[[dict[str, Values], Path], list[Path]]
