"""An export with a damaged file is refused when it is loaded, by name, and never tells another number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnzoo.clinical.trained import load_trained
from tests.helpers.clinical_models import export, icu_cohort, small_trained

NAN, CONFIG, STATISTICS = float("nan"), "config.json", "statistics.json"
DAMAGED: list[tuple[str, tuple[str | int, ...], Any]] = [
    (CONFIG, ("evidence", "shares"), []),
    (CONFIG, ("evidence", "shares"), [NAN]),
    (CONFIG, ("evidence", "shares"), [5.0]),
    (CONFIG, ("evidence", "shares"), [0.5, 0.5]),
    (CONFIG, ("evidence", "stays"), "10"),
    (CONFIG, ("evidence", "stays"), -1),
    (CONFIG, ("evidence", "maps"), {"attention": {"beats_random": "no", "words": "x"}}),
    (CONFIG, ("evidence", "calibrators"), [{"temperature": "1", "intercept": 0}]),
    (CONFIG, ("calibration",), {"temperature": "1", "intercept": "0"}),
    (CONFIG, ("split",), [1]),
    (CONFIG, ("split",), None),
    (CONFIG, ("data",), None),
    (STATISTICS, ("least_coverage",), NAN),
    (STATISTICS, ("least_coverage",), 2),
    (STATISTICS, ("means", 0), NAN),
    (STATISTICS, ("means", 0), "1"),
    (STATISTICS, ("deviations", 0), -1),
    (STATISTICS, ("logged", 0), "false"),
    (STATISTICS, ("hours",), 0),
    (STATISTICS, ("hours",), "12"),
    (STATISTICS, ("rows",), "x"),
    (STATISTICS, ("rows",), -5),
    (STATISTICS, ("variables", 0), "Temp"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("damaged"), small_trained(icu_cohort(), judged=0))


@pytest.mark.parametrize(("file", "place", "value"), DAMAGED, ids=[f"{where} {what}" for _, where, what in DAMAGED])
def test_a_value_that_training_does_not_write(
    checkpoint: Path, file: str, place: tuple[str | int, ...], value: Any
) -> None:
    path = checkpoint / file
    before = path.read_text()
    whole = json.loads(before)
    inner = whole
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(whole))
    try:
        with pytest.raises(ValueError, match=r"is damaged .*export the model again"):
            load_trained(checkpoint)
    finally:
        path.write_text(before)
    assert load_trained(checkpoint).statistics.hours == 12


ROWS = [
    ([99], "rows holds 99; cohort 'set-t' has the rows 0 to 29"),
    ([-1], "rows holds -1"),
    ([True] * 30, r"array of bool of shape \(30,\)"),
    ([0.5], "array of float64"),
    ([[0]], r"of shape \(1, 1\)"),
]


@pytest.mark.parametrize(("rows", "told"), ROWS)
def test_rows_that_a_cohort_does_not_have(checkpoint: Path, rows: list[Any], told: str) -> None:
    trained, cohort = load_trained(checkpoint), icu_cohort()
    with pytest.raises(ValueError, match=told):
        trained.predict(cohort, np.array(rows))
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        trained.predict(cohort, batch_size=0)
    assert trained.predict(cohort, np.array([], int)).shape == (0,)
