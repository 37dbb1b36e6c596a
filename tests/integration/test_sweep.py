"""`python -m train.sweep` on a real local Ray: two variants, made once and asked for again."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from train.sweep import main, plan, table

ROOT = Path(__file__).resolve().parents[2]
TOY = ["model_dim=32", "num_heads=4", "num_layers=1", "mlp_dim=48", "segment=16", "batch_size=2", "seeds=1"]
TOY += ["variants=mha,rcmha", "tables=parameters", "steps=20", "extrapolation_chars=200"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words, draw = ["attention ", "is ", "all ", "you ", "need. "], random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(draw.choice(words) for _ in range(1200)), encoding="utf-8")
    return f"text={path}"


def sweep(directory: Path, *words: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "train.sweep", *words, "--run-dir", str(directory / "sweep"), "--cpus", "1"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


class Listening(threading.Thread):
    """Addresses on which a process and its children listen, collected until `stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.found, self.ended = pid, set(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            try:
                family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
                for process in family:
                    for connection in process.net_connections("inet"):
                        if connection.status == psutil.CONN_LISTEN:
                            self.found.add(connection.laddr.ip)
            except psutil.Error:
                continue


def test_a_sweep_runs_and_goes_on(text, tmp_path, capsys):
    process = sweep(tmp_path, *TOY, text, "--json", str(tmp_path / "report.json"))
    listening = Listening(process.pid)
    listening.start()
    out, errors = process.communicate(timeout=300)
    listening.ended.set()
    assert process.returncode == 0, errors
    assert listening.found
    assert {address.removeprefix("::ffff:") for address in listening.found} == {"127.0.0.1"}
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["variant"], row["ended"], row["steps"]) for row in rows] == [("mha", 1, 20), ("rcmha", 1, 20)]
    assert "bits per character" in out
    runs = sorted((tmp_path / "sweep" / "runs").iterdir())
    assert len(runs) == 2

    # Asked for again: nothing is repeated.
    times = [path.stat().st_mtime_ns for path in runs]
    again = sweep(tmp_path, *TOY, text)
    out_again, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "going on with the sweep" in errors
    assert out_again == out
    assert [path.stat().st_mtime_ns for path in runs] == times

    assert main([*TOY, text, "lr=0.5", "--run-dir", str(tmp_path / "sweep")]) == 2
    assert "a sweep of other settings" in capsys.readouterr().err


def test_plan_of_a_grid(text, tmp_path):
    trials = plan([*TOY, text], ["lr=1e-3,3e-3", "segment=8,16"], tmp_path, asha=True)
    assert len(trials) == 8
    assert len({(t["directory"], t["run"]["variant"]) for t in trials.values()}) == 8
    name = next(name for name in trials if name.startswith("lr=3e-3 segment=8 text-rcmha"))
    assert (trials[name]["config"]["lr"], trials[name]["config"]["segment"]) == (3e-3, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "lr"], "not of the form key=value,value"),
        (["--asha", "tables=recall"], "tables=parameters or tables=flops"),
        (["stpes=2"], "did you mean 'steps'"),
        (["segment=8", "segment=16"], "segment is given twice; keep one of them"),
        (["--grid", "lr=1", "--grid", "lr=2"], "--grid lr is given twice"),
        (["--address", "127.0.0.1:9", "tables=recall"], "no Ray cluster answers at --address 127.0.0.1:9"),
    ],
)
def test_wrong_usage(words, message, text, tmp_path, capsys):
    assert main([text, *words, "--run-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_table():
    common = {"point": "", "table": "parameters", "form": None, "problem": None}
    results = [
        {**common, "variant": "mha", "seed": 0, "ended": True, "step": 9, "accuracy": 0.5},
        {**common, "variant": "mha", "seed": 1, "ended": True, "step": 9, "accuracy": 0.7},
        {**common, "variant": "linear", "seed": 0, "ended": False, "step": 4},
    ]
    assert table(results) == [
        {"table": "parameters", "variant": "mha", "accuracy": "0.6 ± 1.3", "ended": 2, "not ended": 0, "steps": 9},
        {"table": "parameters", "variant": "linear", "accuracy": "", "ended": 0, "not ended": 1, "steps": 4},
    ]
