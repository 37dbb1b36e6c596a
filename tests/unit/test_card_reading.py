"""Cards tell what each kind of model reads: series, texts with and without series, and daily sensors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnzoo.cli import main
from attnzoo.report import Report
from tests.helpers import sensor_models
from tests.helpers.clinical_notes import export_notes
from tests.helpers.clinical_run import written_run
from tests.helpers.clinical_texts import text_cohort

IMPUTED = "nothing is imputed"


def cards(run: Path, data: dict[str, Any] | None = None, settings: str = "task: {kind: x}\n") -> dict[str, str]:
    """The cards of an export, with a report and settings around it."""
    if data is not None:
        report = Report.start(command=["train/main.py"], seed=0)
        report.rows.append({"name": run.name, "steps": 1, "complete": True, "parameters": 5, "data": data})
        report.write(run / "training.json")
        (run / "config.yaml").write_text(settings)
    assert main(["card", str(run)]) == 0
    return {path.name: path.read_text() for path in (run / "card").iterdir()}


def answer(found: dict[str, str], number: str) -> str:
    return next(line for line in found["tripod-ai.md"].splitlines() if line.startswith(f"| {number} | "))


def test_a_model_of_texts_has_no_cells(tmp_path: Path) -> None:
    run = export_notes(tmp_path)
    found = cards(run, {})
    model, data = found["model-card.md"], found["data-card.md"]
    for wrong in ("Cells that", "grid", IMPUTED, "standardised", "Values of an hour", "Shares of each variable"):
        assert wrong not in model + data
    export = json.loads((run / "export" / "config.json").read_text())
    least = export["evidence"]["least_known"]
    assert f"99 % have at least {least} words that the model knows" in model
    assert "`load_ldam(" in model
    assert "Texts are cut into words, digits and marks of punctuation, in lower case, of which the first 256 " in data
    assert f"The text: {export['model']['vocab_size'] - 1} words in lower case" in data
    assert answer(found, "12b").endswith("| done at data-card.md, Preparation and Variables |")
    assert "not done: data-card.md, Variables has the words" in answer(found, "9b")
    export["evidence"] = None  # of before evidence was measured
    (run / "export" / "config.json").write_text(json.dumps(export))
    assert "How many known words are too few: unknown" in cards(run)["model-card.md"]


def test_a_model_of_texts_and_series_reads_both_and_no_facts_of_admission(tmp_path: Path) -> None:
    ages_N1 = np.full((120, 1), 60.0, np.float32)
    cohort = replace(text_cohort(120, variables=("HR", "Temp")), statics=("age",), statics_NS=ages_N1)
    found = cards(export_notes(tmp_path, cohort), {})
    model, data = found["model-card.md"], found["data-card.md"]
    for text in ("The first 256 words", "Cells that were not measured are input"):
        assert text in model
    for text in ("A text that is empty", IMPUTED, "Values of an hour: the last one", "| HR | heart rate |"):
        assert text in data
    assert "| age |" not in data


def test_an_adapter_for_sensors_has_a_card(tmp_path: Path) -> None:
    """Its statistics are of means and variances; a sensor that was not measured is told as the mean."""
    run = sensor_models.export(tmp_path / "run", sensor_models.language_model(tmp_path / "lm"))
    path = run / "export" / "config.json"
    content = json.loads(path.read_text())
    content |= {"data": {"format": "pmdata"}, "split": {"split": "time", "digest": "abc"}}
    path.write_text(json.dumps(content))
    found = cards(run, {"missing": {"sleep_minutes": {"hours": 0.25, "stays": 0.0}}})
    model, data = found["model-card.md"], found["data-card.md"]
    assert model.startswith("<!-- ")
    assert "# Model card: fatigue, predicted by the run run" in model
    assert f"a frozen language model, `{content['language_model']['checkpoint']}`" in model
    assert "`load_sensors(" in model
    assert "- Split in time: the same patients may be in all parts." in model
    assert "| sleep_minutes variance | minutes asleep | min | 0 to 1000 | 900 | 800 | as it is |" in data
    assert "A sensor without any value has the mean of the training part" in data
    assert "| sleep_minutes | 0.25 | 0 |" in data
    for wrong in ("Cells that", IMPUTED, "Values of an hour", "log(1 + n)"):
        assert wrong not in model + data


@pytest.mark.parametrize(("name", "step"), [("pmdata", "a day"), ("physionet2012", "an hour")])
def test_steps_are_told_by_their_length(tmp_path: Path, name: str, step: str) -> None:
    run = written_run(tmp_path)
    path = run / "export" / "config.json"
    content = json.loads(path.read_text())
    content["data"]["format"] = name
    path.write_text(json.dumps(content))
    data = cards(run)["data-card.md"]
    assert f"Values of {step}: the last one" in data
    assert f"as a share of 48 {step.split()[1]}s." in data


def test_weights_that_another_run_learned_are_told(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    assert "It began with" not in cards(run)["model-card.md"]
    settings = run / "config.yaml"
    settings.write_text(settings.read_text() + "checkpoint: {init_from: runs/pretrained}\n")
    assert "It began with the weights of `runs/pretrained` (`checkpoint.init_from`)" in cards(run)["model-card.md"]
