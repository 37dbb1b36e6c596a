"""What saving a model finds out about it beside its metrics, and the bar while its explanations are judged."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from train.bar import Bar
from train.config import Config


@dataclass(frozen=True)
class Findings:
    """as_served: the metrics of the model with its calibration, as it predicts; {} where it is served as it was
    trained. words: sentences for the run's last lines."""

    as_served: Mapping[str, float] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, served: Mapping[str, float] | None, refused: Mapping[str, str | None], explanations: Iterable[str]
    ) -> "Findings":
        """served: the calibrated model's metrics; None without any calibration. refused: why none is applied, as the
        end of a sentence, by what would be calibrated. explanations: the verdicts on them, in words."""
        told = {"validation_loss" if name == "loss" else name: value for name, value in (served or {}).items()}
        words = [
            f"warning: {what} is not calibrated, and served without an interval: {why}"
            for what, why in refused.items()
            if why is not None
        ]
        if told:
            words.append(f"as served, calibrated: {', '.join(f'{name} {value:z.4f}' for name, value in told.items())}")
        return cls(told, (*words, *explanations))

    def metadata(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """An export's metadata, with the metrics as served where it holds metrics."""
        known = bool(self.as_served) and given.get("validation_loss") is not None
        return {**given, "as_served": dict(self.as_served)} if known else dict(given)

    def row(self) -> dict[str, Any]:
        """For the row of training.json."""
        return {"as_served": dict(self.as_served), "findings": list(self.words)}


@contextmanager
def judging(config: Config, on: str, passes: int) -> Iterator[Callable[[], object]]:
    """A bar while explanations are judged on some rows; what the context gives is called once a pass. Rank 0."""
    shown = config.log.progress
    if shown:
        tqdm.write(f"{config.name}: judging explanations on {on} (task.explained)", file=sys.stderr)
    with Bar(total=passes, desc="explanations", unit="pass", leave=False, disable=not shown) as bar:
        yield bar.update
