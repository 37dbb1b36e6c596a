"""Cards of clinical runs: what they say is in the run's files, and what is not there is not said."""

import hashlib
import json
from pathlib import Path

import pytest

from attnzoo.cli import main
from attnzoo.clinical.card_items import KNOWN
from attnzoo.clinical.tripod import ITEMS
from tests.helpers.clinical_data import small_cohort
from tests.helpers.clinical_run import written_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written_run(tmp_path)


def cards(run: Path, *words: str) -> dict[str, str]:
    assert main(["card", str(run), *words]) == 0
    return {path.name: path.read_text() for path in sorted((run / "card").iterdir())}


def test_a_calibration_of_several_labels_is_told_without_its_samples(run: Path) -> None:
    path = run / "export" / "config.json"
    content, one = json.loads(path.read_text()), {"temperature": 1.5, "intercept": 0.25}
    fitted = {"exclusive": False, "rows": 9, "calibrators": [one, None], "drawn": [[one] * 5, []]}
    for change, told in (({}, "`CC`"), ({"exclusive": True, "calibrators": [one]}, "`all labels`")):
        path.write_text(json.dumps({**content, "labels": ["CC", "LABS"], "calibration": {**fitted, **change}}))
        card = cards(run)["model-card.md"]
        assert f'{told}: {{"temperature": 1.5, "intercept": 0.25}}' in card
        assert ("`LABS`: as the model tells it" in card) == (not change)
        assert card.count("temperature") == 1


@pytest.mark.parametrize(("name", "row"), [("mts_dialog", "dialogue"), ("pmdata", "day"), ("physionet2012", "stay")])
def test_cards_count_what_the_rows_are(run: Path, name: str, row: str) -> None:
    path, report = run / "export" / "config.json", run / "training.json"
    content, told = json.loads(path.read_text()), json.loads(report.read_text())
    content["data"]["format"], content["metadata"]["validation_loss"] = name, -0.0
    path.write_text(json.dumps(content))
    told["rows"][0]["steps"] = 1
    report.write_text(json.dumps(told))
    found = cards(run)
    model, data = found["model-card.md"], found["data-card.md"]
    assert f"| part | {row}s | labels | events |" in data
    assert f"- Split by {row}: {row}s of one patient may be in several parts" in model
    assert f"Predicted once for each {row}." in model
    assert f"all {row}s with a label were taken" in found["tripod-ai.md"]
    assert "\n1 step, complete: " in model
    assert "| validation_loss | 0 |" in model
    assert "digests of the values: unknown: the run does not say" in data


def test_cards_say_what_the_run_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cards(run)
    names = ("data-card.md", "model-card.md", "tripod-ai.md")
    assert tuple(found) == names
    assert sorted(capsys.readouterr().out.split()) == [str(run / "card" / name) for name in names]
    model, data, items = found["model-card.md"], found["data-card.md"], found["tripod-ai.md"]
    weights = hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()
    for text in (
        "mortality, predicted by the run tiny",
        f"| export/model.safetensors | {weights} |",
        "| auroc | 0.625 |",
        "Selection: the weights after step 4: those with the best figures on the inner validation part, at most 2",
        "(`eval.keep_best`); 1 evaluation in metrics.jsonl.",
        "The model as it is served:",
        "Whether they point at what the model uses was not measured",
        "- `seed`: 3",
        "Command: `train/main.py --config x.yaml`",
        "None is applied.",
        "How the values below were found: unknown",
        "Split by stay",
    ):
        assert text in model
    grid = small_cohort().grid
    some = grid.counts_NTV[:30, :, 0] > 0
    for text in (
        "| training | 30 | 30 | 6 |",
        "| HR | 90 | 2 |",
        "| stays without outcome | 4 |",
        f"| HR | {round(1 - some.mean(), 4):.4g} | {round((~some.any(axis=1)).mean(), 4):.4g} |",
        "- `digest`: abc",
        "- `path`: set-a",
        "The data set does not say which stays are of one patient.",
    ):
        assert text in data
    assert "none" not in data.split("## Left out")[1]
    rows = [line.split(" | ") for line in items.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [item.number for item in ITEMS]
    told = {row[0].removeprefix("| "): row[3].removesuffix(" |") for row in rows}
    assert (told["17"], told["18a"], told["21"]) == ("not done", "not done", "done at data-card.md, Parts")
    assert told["24"] == "not applicable: the model was not updated after training"
    sections = {
        name: [line[3:] for line in text.splitlines() if line.startswith("## ")] for name, text in found.items()
    }
    for text in told.values():
        if text.startswith("done at "):  # at a section that there is
            name, _, section = text.removeprefix("done at ").partition(", ")
            assert set(section.split(" and ")) <= set(sections[name])
    states = [text.split(" at ")[0].split(":")[0] for text in told.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "not applicable", "not done"))
    assert f"27 items, with their parts 52: {counts}." in items
    assert cards(run) == found  # written anew


def test_figures_are_told_before_and_after_calibration(run: Path) -> None:
    """And what became of the calibration and of explanations."""
    path = run / "export" / "config.json"
    export = json.loads(path.read_text())
    export["calibration"] = {"temperature": 1.25, "intercept": -0.5}
    export["evidence"] = {"maps": {"attention": {"beats_random": False, "words": "On 32 stays attention is not"}}}
    export["metadata"] |= {"validation_loss": 0.5, "as_served": {"validation_loss": 0.375, "auroc": 0.625}}
    path.write_text(json.dumps(export))
    row = json.loads((run / "training.json").read_text())
    row["rows"][0]["selected_steps"] = [44, 60]
    (run / "training.json").write_text(json.dumps(row))
    card = cards(run)["model-card.md"]
    assert "| measure | before calibration | as served, calibrated |" in card
    assert "| validation_loss | 0.5 | 0.375 |" in card
    assert "Selection: the weights after steps 44, 60, their mean: those with" in card
    assert "- On 32 stays attention is not" in card
    del export["metadata"]["as_served"]  # an export of before
    path.write_text(json.dumps(export))
    assert "The model before its calibration:" in cards(run)["model-card.md"]
    export |= {"calibration": None, "evidence": {"uncalibrated": "too few stays"}}
    path.write_text(json.dumps(export))
    found = cards(run)
    assert "None is applied. Predictions have no interval. It was refused: too few stays." in found["model-card.md"]
    assert "| 24 | " in found["tripod-ai.md"]
    del row["rows"][0]["selected_steps"]  # a run of before
    (run / "training.json").write_text(json.dumps(row))
    assert "after which steps is unknown" in cards(run)["model-card.md"]


def test_what_a_run_does_not_say_is_not_done(run: Path) -> None:
    """An older report without parts, an export without statistics; and a calibrated one."""
    report = json.loads((run / "training.json").read_text())
    report["rows"][0]["data"] = {}
    (run / "training.json").write_text(json.dumps(report))
    export = json.loads((run / "export" / "config.json").read_text())
    export["calibration"] = {"temperature": 1.25, "intercept": -0.5}
    (run / "export" / "config.json").write_text(json.dumps(export))
    (run / "export" / "statistics.json").unlink()
    (run / "metrics.jsonl").unlink()
    found = cards(run)
    assert "Stays and events of each part: unknown" in found["data-card.md"]
    assert "Measured variables: unknown" in found["data-card.md"]
    assert "- `temperature`: 1.25" in found["model-card.md"]
    for number, answer in (("9a", "not done"), ("21", "not done"), ("24", "done at model-card.md, Calibration")):
        assert f"| {number} | " in found["tripod-ai.md"]
        assert next(line for line in found["tripod-ai.md"].splitlines() if line.startswith(f"| {number} ")).endswith(
            f"| {answer} |"
        )


def test_the_author_answers_what_a_run_cannot_know(run: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.yaml"
    answers.write_text("17: approved by\n  the board | 2026-11\n18a: none\n")
    text = cards(run, "--answers", str(answers))["tripod-ai.md"]
    assert f"| done at {answers}: approved by the board \\| 2026-11 |" in text
    assert f"| done at {answers}: none |" in text


def test_refusals(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["card", *words]) == 2
        return capsys.readouterr().err

    assert "is no directory; name the run directory that training has written" in refused(str(tmp_path / "nowhere"))
    assert "has no export/config.json: a card is written of a finished run; train it first" in refused(str(tmp_path))
    assert "it is an export: name the run directory above it" in refused(str(run / "export"))
    for text, message in (
        ("18g: x", "item '18g' is none of TRIPOD+AI's; did you mean '18"),
        ("17: [a]", "the answer to item 17 is ['a']; write a text, or leave the item out"),
        ("- 17", "the file holds a list"),
    ):
        (tmp_path / "answers.yaml").write_text(text)
        assert message in refused(str(run), "--answers", str(tmp_path / "answers.yaml"))
    assert not (run / "card").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data-card.md").write_text("by hand")
    assert "data-card.md was not written by attnzoo card, and would be lost" in refused(
        str(run), "--out", str(tmp_path / "mine")
    )
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["data-card.md"]
    (run / "config.yaml").write_text("task: {kind: clinical-pretraining}\n")
    assert "task.kind=clinical-pretraining predicts nothing yet" in refused(str(run))
    (run / "training.json").unlink()
    assert "has no training.json" in refused(str(run))
    (run / "export" / "config.json").write_text('{"model_dim": 8}')
    assert "is not a clinical run" in refused(str(run))
    assert "cards are written of runs whose task.kind is clinical" in refused(str(run))


def test_there_are_27_items_in_52_parts() -> None:
    whole = {int("".join(letter for letter in number if letter.isdigit())) for number in KNOWN}
    assert (whole, len(KNOWN), len(ITEMS)) == (set(range(1, 28)), 52, 52)
