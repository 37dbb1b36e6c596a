"""The main job from end to end, on a corpus of seconds: train with DeepSpeed, serve on Ray, complete, report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import ROOT, write_tiny


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
    options = ["model.max_positions=64", "data.sequence_length=32", "optim.lr=1e-9", "optim.muon_lr=1e-9"]
    for _ in range(2):  # the second time nothing is trained again
        result = subprocess.run(
            [*command, *options], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        # A model that learns nothing is worse than an n-gram model, and the demo says so.
        assert result.returncode == 1, result.stderr
        assert "the server shut down cleanly" in result.stdout
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert [claim["holds"] for claim in summary["claims"]] == [False, True]
        assert [row["new tokens"] for row in summary["rows"] if "new tokens" in row] == [4, 4]
        assert summary["figures"] == ["loss.png"]
        assert (run / "loss.png").stat().st_size > 1000
