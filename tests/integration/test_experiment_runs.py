"""Experiments that train by train/main.py: whole runs in processes of their own."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.trained import load_trained
from tests.helpers.clinical_files import write_yaib_hourly
from train.experiments.runs import _process, run_steps, trained_run

SMALL = ["train.steps=3", "schedule.warmup_steps=1", "eval.every=2", "model.model_dim=8", "train.batch_size=8"]


def test_a_run_is_read_while_it_stands_and_then_deleted(tmp_path: Path) -> None:
    words = [f"data.path={write_yaib_hourly(tmp_path / 'demo')}", *SMALL, "train.micro_batch_size=8"]
    assert run_steps("tscan-los.yaml", words) == 3
    ticks: list[float] = []
    with trained_run("tscan-los.yaml", words, lambda: ticks.append(time.monotonic())) as run:
        model, names = load_trained(run), {path.name for path in run.iterdir()}
    assert len(ticks) == 3
    assert {"training.json", "metrics.jsonl", "config.yaml", "export"} <= names
    assert not run.exists()
    cohort = load_cohort("yaib", tmp_path / "demo")
    found = model.predict(cohort)
    assert found.shape == (*cohort.label("los").shape, 10)
    assert np.isfinite(found[~np.isnan(cohort.label("los"))]).all()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"a run of tscan-los.yaml ended with exit status 2: .*nowhere does not exist"),
        trained_run("tscan-los.yaml", [f"data.path={tmp_path / 'nowhere'}"], lambda: None),
    ):
        pass
    with pytest.raises(ValueError, match="an experiment needs a number of steps"):
        run_steps("tscan-los.yaml", ["train.steps=null", "train.max_minutes=1", "schedule.warmup_steps=20"])


def test_a_process_ends_with_the_worker_that_started_it() -> None:
    """A pool ends its workers by SIGTERM."""
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            with Path(os.devnull).open("wb") as nowhere, _process(["sleep", "60"], nowhere) as process:
                os.write(writing, str(process.pid).encode())
                time.sleep(60)
        finally:
            os._exit(0)
    child = psutil.Process(int(os.read(reading, 20)))
    os.kill(worker, signal.SIGTERM)
    os.waitpid(worker, 0)
    child.wait(10)
    assert not child.is_running()
