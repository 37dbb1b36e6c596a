"""A run directory with damaged files has no card, and says so in one line; cards are written all or none."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from tests.helpers.clinical_run import written_run

CONFIG, REPORT, STATISTICS = "export/config.json", "training.json", "export/statistics.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written_run(tmp_path)


DAMAGED: list[tuple[str, tuple[str | int, ...], Any]] = [
    (CONFIG, ("outcome",), "x"),
    (CONFIG, ("outcome",), {"edges": 5}),
    (CONFIG, ("outcome",), {"edges": [1, "a"]}),
    (CONFIG, ("labels",), 5),
    (CONFIG, ("calibration",), [1]),
    (CONFIG, ("calibration",), {"calibrators": [None], "exclusive": False}),
    (CONFIG, ("data", "format"), ["x"]),
    (REPORT, ("rows",), "x"),
    (REPORT, ("rows",), [5]),
    (REPORT, ("command",), 5),
    (REPORT, ("versions",), None),
    (REPORT, ("rows", 0, "data"), {"parts": {"a": 5}}),
    (REPORT, ("rows", 0, "data"), {"missing": {"HR": {}}}),
    (REPORT, ("rows", 0, "data"), {"left_out": [1]}),
    (STATISTICS, ("variables",), None),
    (STATISTICS, ("means",), [1]),
    (STATISTICS, ("least_coverage",), "x"),
]
LINES = [
    ("config.yaml", "task: x"),
    ("config.yaml", "eval: 5"),
    ("config.yaml", "train: {x: !!binary aGk=}"),
    ("metrics.jsonl", '{"kind": "eval", "step": null}'),
    ("metrics.jsonl", '{"kind": "eval", "step": "x"}'),
    ("metrics.jsonl", '{"kind": "eval", "step": 1e400}'),
]


def refused(run: Path, told: str, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(["card", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("attnzoo card: error: ")
    assert (told in error, error.count("\n")) == (True, 1), error


@pytest.mark.parametrize(("file", "place", "value"), DAMAGED, ids=[f"{where} {what}" for _, where, what in DAMAGED])
def test_a_value_of_another_kind(
    run: Path,
    file: str,
    place: tuple[str | int, ...],
    value: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = json.loads((run / file).read_text())
    inner = whole
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    (run / file).write_text(json.dumps(whole))
    refused(run, "is damaged", capsys)
    assert not (run / "card").exists()


@pytest.mark.parametrize(("file", "line"), LINES)
def test_a_line_of_another_kind(run: Path, file: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run / file).write_text(line)
    refused(run, "is damaged", capsys)


def test_lines_that_cannot_be_read_are_those_of_a_run_that_was_killed(run: Path) -> None:
    (run / "metrics.jsonl").write_text("\n".join(["[" * 100_000, "9" * 5000, '{"kind": "eval", "step": 4}']))
    assert main(["card", str(run)]) == 0
    assert "1 evaluation in" in (run / "card" / "model-card.md").read_text()


def test_a_run_without_its_weights_is_not_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export" / "model.safetensors").unlink()
    refused(run, "has no export/model.safetensors", capsys)


def test_cards_are_written_all_or_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "card").write_text("mine")
    refused(run, "is not a directory", capsys)
    (run / "card").unlink()
    (run / "card").mkdir()
    (run / "card" / "tripod-ai.md").symlink_to("/proc/nowhere/tripod-ai.md")
    refused(run, "there is no directory", capsys)
    assert [path.name for path in (run / "card").iterdir()] == ["tripod-ai.md"]
