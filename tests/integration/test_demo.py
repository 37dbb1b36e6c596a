"""The main job from end to end, on a corpus of seconds: train with DeepSpeed, serve on Ray, complete, report; again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training import ROOT, write_tiny


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "scripts.demo",
        "--config",
        str(config),
        "--run-dir",
        str(run),
        "--max-tokens",
        "4",
    ]
    options = ["model.max_positions=64", "data.sequence_length=32", "eval.below_ngrams=[3]"]
    options += ["optim.lr=1e-9", "optim.muon_lr=1e-9"]
    for time in range(2):  # the second time it is trained anew
        result = subprocess.run(
            [*command, *options], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        # A model that learns nothing is worse than an n-gram model, and the demo says so.
        assert result.returncode == 1, result.stderr
        assert ("training begins anew" in result.stdout) == (time == 1)
        assert (tmp_path / "run-set-aside-1" / "summary.json").is_file() == (time == 1)
        assert "the server shut down cleanly" in result.stdout
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert [claim["holds"] for claim in summary["claims"]] == [False, True]
        assert [row["new tokens"] for row in summary["rows"] if "new tokens" in row] == [4, 4]
        assert summary["figures"] == ["loss.png"]
        assert (run / "loss.png").stat().st_size > 1000
    before = (run / "metrics.jsonl").read_bytes()
    # Without a claim on training the finished run is used again: nothing is trained or evaluated.
    options[2] = "eval.below_ngrams=[]"
    (run / "summary.json").unlink()
    result = subprocess.run(
        [*command, "--train-only", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "validation" not in result.stderr
    assert (run / "metrics.jsonl").read_bytes() == before
    assert f"plot in {run / 'loss.png'}" in result.stdout
