"""Whole runs of train/main.py as parts of experiments: what an experiment measures is what users train."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnzoo import apps
from attnzoo.workers import THREADS, Tick
from train.config_reader import load_config
from train.metrics import read_metrics

LOOK_S = 0.5
"""Seconds between two looks at a run's metrics."""
QUIET = ("log.progress=false", "log.tensorboard=false", "log.wandb=false", "log.every=1", "train.threads=1")
TOLD_LINES = 5
"""Last lines of a run's output that an error quotes."""


def run_steps(config: str, overrides: Sequence[str]) -> int:
    """How often `trained_run` calls `tick`. Raises ValueError for a configuration that does not fix its steps."""
    steps = load_config(config, list(overrides)).train.steps
    if steps is None:
        raise ValueError(f"{config}: train.steps={steps}; an experiment needs a number of steps")
    return steps


@contextmanager
def trained_run(config: str, overrides: Sequence[str], tick: Tick) -> Iterator[Path]:
    """Trains by `python train/main.py --config CONFIG ...`: one rank with one thread, in a process and a directory of
    its own. Yields the run's directory, with the export; it is deleted afterwards. tick: called after every step.

    Raises ValueError with the last lines that the run has printed, if it fails.
    """
    steps = run_steps(config, overrides)
    with tempfile.TemporaryDirectory(prefix="attnzoo-run-") as folder:
        run, log = Path(folder) / "run", Path(folder) / "output.txt"
        main = str(apps.directory() / "train" / "main.py")
        command = [sys.executable, main, "--config", config, *overrides, *QUIET, f"run_dir={run}"]
        done = 0
        with log.open("wb") as output, _process(command, output) as process:
            while process.poll() is None:
                try:
                    process.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    now = _steps_done(run)
                    for _ in range(now - done):
                        tick()
                    done = max(now, done)
        if process.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-TOLD_LINES:]
            raise ValueError(f"a run of {config} ended with exit status {process.returncode}: {' / '.join(last)}")
        for _ in range(steps - done):
            tick()
        yield run


@contextmanager
def _process(command: list[str], output: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """The process of a command; it is killed where this one is interrupted, or ended by SIGTERM as a worker is."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)) if is_main else None
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
        process.kill()
        process.wait()


def _steps_done(run: Path) -> int:
    """Number of steps that stand in the metrics so far."""
    file = run / "metrics.jsonl"
    return sum(record["kind"] == "train" for record in read_metrics(file)) if file.is_file() else 0
