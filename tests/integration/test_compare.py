"""`attnzoo compare` from end to end, at sizes of a toy: resumed, repeated, refused."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnzoo.cli import main
from scripts.compare import Comparison, parse_settings, run_one
from scripts.compare.config import QUICK
from scripts.compare.runs import finished
from tests.helpers.newcomers import NEWCOMERS, plugged_in
from tests.helpers.training import last_of

ROOT = Path(__file__).resolve().parents[2]
TOY = [
    "model_dim=32", "num_heads=4", "num_layers=1", "mlp_dim=48", "segment=16", "chunk=7", "steps=3", "batch_size=2",
    "warmup_steps=2", "seeds=2", "extrapolation_chars=200", "paper.steps=10", "paper.table_rows=64", "recall.steps=2",
    "paper.batch_size=2", "recall.test_sequences=8", "recall.batch_size=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words, draw = ["attention ", "is ", "all ", "you ", "need. "], random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(draw.choice(words) for _ in range(1200)), encoding="utf-8")
    return f"text={path}"


def numbers(directory: Path) -> dict[str, dict]:
    """Contents of all runs but the time they took."""
    found = {path.name: json.loads(path.read_text()) for path in directory.glob("*.json")}
    for content in found.values():
        content.pop("seconds")
    return found


@pytest.mark.parametrize("table", ["parameters", "recall", "paper"])
def test_a_run_is_the_same_again_and_is_not_made_twice(table, text, tmp_path):
    comparison = Comparison(parse_settings([*TOY, text]))
    run = next(run for run in comparison.plan() if (run.table, run.variant) == (table, "rcmha"))
    first = run_one(comparison, run, tmp_path / "a")
    second = run_one(comparison, run, tmp_path / "b")
    assert first["results"] == second["results"]
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    (path,) = (tmp_path / "a").iterdir()
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))
    assert run_one(comparison, run, tmp_path / "a")["seconds"] == json.loads(path.read_text())["seconds"]


def test_a_run_of_other_settings_is_refused(text, tmp_path):
    comparison = Comparison(parse_settings([*TOY, text]))
    run_one(comparison, comparison.plan()[0], tmp_path)
    other = Comparison(parse_settings([*TOY, text, "lr=0.5"]))
    with pytest.raises(ValueError, match=r"was made with lr=0\.004, not 0\.5: choose another --run-dir"):
        run_one(other, other.plan()[0], tmp_path)


def test_compare_from_end_to_end(text, tmp_path, capsys):
    words = ["compare", *TOY, text, "--json", str(tmp_path / "report.json"), "--figures", str(tmp_path / "figures")]
    assert main([*words, "--run-dir", str(tmp_path / "one"), "--workers", "1"]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    tables = {row["table"] for row in report["rows"]}
    assert tables == {
        "matched parameters", "matched parameters, cost", "matched parameters, longer windows", "matched FLOPs",
        "matched FLOPs, cost", "matched FLOPs, longer windows", "recall", "equal shapes", "paper's setting",
        "beside the paper",
    }  # fmt: skip
    assert all(name in printed.out for name in tables)
    assert "steps/s" in printed.err
    assert report["claims"]
    assert all(claim["holds"] for claim in report["claims"])
    assert len(report["figures"]) == 3
    assert all(Path(figure).read_bytes().startswith(b"\x89PNG") for figure in report["figures"])
    published = {row["what"]: row["paper"] for row in report["rows"] if row["table"] == "beside the paper"}
    assert published["RCMHA memory, GB"] == 2.98
    assert published["RMHA memory, GB"] == 3.5
    assert published["RCMHA validation accuracy, same run"] == 0.572

    # A part of it made again by two workers, the rest from the first directory: the same numbers.
    (tmp_path / "two").mkdir()
    made = sorted((tmp_path / "one").iterdir())
    for path in set(made) - set(made[::5]):
        (tmp_path / "two" / path.name).write_bytes(path.read_bytes())
    assert main([*words, "--run-dir", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert "runs are in" in capsys.readouterr().err
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")


def test_ctrl_c_keeps_finished_runs(text, tmp_path):
    words = last_of([*TOY, text, "steps=100000", "tables=recall,parameters", "variants=linear", "seeds=1"])
    command = [sys.executable, "-m", "attnzoo", "compare", *words, "--run-dir", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell's background jobs ignore interrupts, and so would whatever the suite starts when it is one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "recall-linear-seed0.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["recall-linear-seed0.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stesp=3"], "did you mean 'steps'"),
        (["text=nowhere.txt"], "give a text file with text=PATH"),
        (["variants=rcmah"], "did you mean 'rcmha'"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
    ],
)
def test_wrong_usage_goes_to_stderr_with_status_2(words, message, capsys):
    assert main(["compare", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_a_failing_worker_says_why(text, tmp_path, capsys):
    # The run directory is a file: each worker fails when it writes.
    (tmp_path / "file").write_text("")
    words = ["compare", *TOY, text, "variants=linear", "tables=recall", "--workers", "2"]
    assert main([*words, "--run-dir", str(tmp_path / "file" / "runs")]) == 1
    assert "recall-linear-seed" in capsys.readouterr().err


def test_show_and_help(text, capsys):
    assert main(["compare", *TOY, text, "--show"]) == 0
    printed = capsys.readouterr().out
    assert "paper.steps=10" in printed
    assert "paper-rcmha-published-seed0" in printed
    assert "paper-linear" not in printed
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.slow
def test_quick(text, tmp_path):
    assert QUICK["segment"] < 256
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "attnzoo", "compare", text, "--quick", "--run-dir", str(tmp_path / "runs")]
    subprocess.run([*command, "--json", str(path)], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    assert json.loads(path.read_text())["quick"] is True


def test_runs_of_a_plug_in_that_has_changed_are_refused(text, tmp_path):
    first, plugin = (NEWCOMERS / "plain.py").read_text(encoding="utf-8"), tmp_path / "plain.py"

    def settings(content: str):
        plugin.write_text(content, encoding="utf-8")
        with plugged_in(plugin, "plain"):
            comparison = Comparison(parse_settings([*TOY, text, "variants=[plain]"]))
            run = next(run for run in comparison.plan() if run.table == "paper")
            (path,) = list(tmp_path.glob("*.json")) or [tmp_path / f"{comparison.name(run)}.json"]
            if not path.is_file():
                path.write_text(json.dumps({"settings": comparison.settings(run), "results": {}}))
            return finished(comparison, run, tmp_path)

    made = settings(first)
    assert settings(first.replace("Softmax attention;", "Attention;")) == made
    with pytest.raises(ValueError, match=r"was made with plain\.py \(content\)=\w+, not \w+: choose another --run-dir"):
        settings(first.replace("torch.ones", "torch.zeros"))
