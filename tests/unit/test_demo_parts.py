"""scripts/demo.py without training: which finished run is used again, and which claims belong to a configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnzoo.report import Claim, Report
from scripts.demo import BELOW, claims, set_aside, shown, why_anew
from train.config_reader import load_config
from train.run_directory import locked

SHORT = "the budget train.max_minutes=4 is enough for 21 steps"


def training(complete: bool = True, steps: int = 50, short: str | None = None) -> dict[str, Any]:
    row = {"steps": steps, "complete": complete, "bits_per_byte": 2.5 if complete else None, "budget": {"short": short}}
    return {"rows": [row]}


def summary(measured: float, steps: int = 50, served: float = 1.0) -> dict[str, Any]:
    report = Report.start()
    report.rows.append({"table": "training", "steps": steps, "bits_per_byte": 2.5})
    report.claims.append(Claim(name=f"{BELOW}3 n-gram model", expected=2.6, measured=measured))
    report.claims.append(Claim(name="KV bytes", expected=1.0, measured=served, kind="equal"))
    return report.to_dict()


@pytest.mark.parametrize(
    ("of_training", "of_demo", "why"),
    [
        (None, None, None),
        (training(complete=False), None, None),  # goes on
        (training(complete=False, short=SHORT), summary(2.7), None),
        (training(), None, None),  # was killed before its summary
        (training(), summary(2.5), None),
        (training(short=SHORT), summary(2.5), None),  # reached what it claims all the same
        (training(), summary(2.5, served=2.0), None),  # training cannot mend that
        (training(), summary(2.7), f"did not reach what it claims ({BELOW}3 n-gram model)"),
        (training(), summary(2.7, steps=40), None),  # of an earlier state
        (training(short=SHORT), summary(2.5, steps=40), f"had too small a budget ({SHORT})"),
        (training(short=SHORT), None, f"had too small a budget ({SHORT})"),
    ],
)
def test_a_finished_run_is_used_again_where_it_reached_its_claims(
    of_training: dict[str, Any] | None, of_demo: dict[str, Any] | None, why: str | None
) -> None:
    assert why_anew(of_training, of_demo) == why


def test_a_run_that_failed_is_moved_aside_and_nothing_of_it_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert set_aside(run) is None
    for number in (1, 2):
        run.mkdir()
        (run / "training.json").write_text(json.dumps(training(steps=number)))
        (run / "summary.json").write_text(json.dumps(summary(2.7, steps=number)))
        with locked(run), pytest.raises(ValueError, match="is in use by another run"):
            set_aside(run)
        assert set_aside(run) == tmp_path / f"run-set-aside-{number}"
        assert f"in run did not reach what it claims ({BELOW}3 n-gram model): it is in run-s" in capsys.readouterr().out
        assert not run.exists()
    kept = [json.loads((tmp_path / f"run-set-aside-{n}" / "training.json").read_text()) for n in (1, 2)]
    assert [report["rows"][0]["steps"] for report in kept] == [1, 2]
    run.mkdir()
    (run / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training.json is no report of a run .* choose another --run-dir"):
        set_aside(run)
    assert shown(run / "loss.png") == "run/loss.png"
    assert shown(Path("/elsewhere/loss.png")) == "/elsewhere/loss.png"


@pytest.mark.parametrize(("name", "orders"), [("demo.yaml", [3]), ("long.yaml", [3, 5]), ("base.yaml", [])])
def test_claims_belong_to_the_configuration(name: str, orders: list[int], tmp_path: Path) -> None:
    """Served or not: long.yaml asks for order 5, demo.yaml does not."""
    (tmp_path / "config.yaml").write_text(load_config(name).to_yaml())
    ngrams = {3: 2.6, 4: 2.0, 5: 1.8, 6: 1.7}
    found = claims({"bits_per_byte": 2.1}, ngrams, [], tmp_path)
    assert [claim.name for claim in found] == [f"{BELOW}{order} n-gram model" for order in orders]
    assert [claim.holds for claim in found] == [order == 3 for order in orders]
