"""Signals and kills: no step is lost that was saved, and nothing half written is taken for a checkpoint."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.training import ROOT, command, environment, launch, losses, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("faults"))


class Training:
    """A long run in the background."""

    def __init__(self, config: Path, run: Path) -> None:
        self.run = run
        options = (f"run_dir={run}", "train.steps=1000000", "eval.every=null", "schedule.kind=constant")
        self.process = subprocess.Popen(
            command(config, *options), env=environment(), start_new_session=True, stderr=subprocess.DEVNULL
        )
        self.ranks = self._started()

    def _started(self) -> list[psutil.Process]:
        deadline = time.monotonic() + 200
        metrics = self.run / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") >= 3):
            assert self.process.poll() is None, "the run ended before its third step"
            assert time.monotonic() < deadline, "no third step in 200 s"
            time.sleep(0.1)
        children = psutil.Process(self.process.pid).children(recursive=True)
        ranks = {a: c for c in children for a in c.cmdline() if a.startswith("--local_rank=")}
        return [ranks[name] for name in sorted(ranks)]

    def saved(self) -> int:
        """The step of the latest checkpoint, which must be the last recorded one."""
        name = (self.run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        step: int = json.loads((self.run / "checkpoints" / name / "state.json").read_text())["progress"]["step"]
        assert step == max(losses(self.run))
        return step


@pytest.fixture
def training(tiny: Path, tmp_path: Path) -> Iterator[Training]:
    started = Training(tiny, tmp_path / "run")
    yield started
    for process in started.ranks:
        if process.is_running():
            process.kill()
    started.process.kill()
    started.process.wait()


def test_sigterm_to_one_rank_saves_and_exits_0(training: Training, tiny: Path) -> None:
    assert len(training.ranks) == 2
    training.ranks[1].terminate()
    assert training.process.wait(timeout=60) == 0
    step = training.saved()
    options = ("train.steps=1000000", "eval.every=null", "schedule.kind=constant")
    launch(tiny, f"run_dir={training.run}", *options, f"train.stop_at_step={step + 2}")
    assert list(losses(training.run)) == list(range(1, step + 3))


def test_sigterm_to_the_deepspeed_command_saves(training: Training) -> None:
    training.process.terminate()
    # DeepSpeed's command has no handler: it dies by the signal. Its ranks notice, save and end by themselves.
    assert training.process.wait(timeout=60) == -signal.SIGTERM
    gone, alive = psutil.wait_procs(training.ranks, timeout=60)
    assert not alive
    assert len(gone) == 2
    assert training.saved() >= 3


@pytest.mark.slow
def test_ctrl_c_saves(training: Training) -> None:
    os.killpg(training.process.pid, signal.SIGINT)
    training.process.wait(timeout=60)
    assert not psutil.wait_procs(training.ranks, timeout=60)[1]
    assert training.saved() >= 3


def test_kill_in_the_middle_of_a_checkpoint_leaves_the_previous_one(tiny: Path) -> None:
    run, whole = tiny.parent / "killed", tiny.parent / "whole"
    options = ("checkpoint.every=2", "checkpoint.keep=2")
    killed = subprocess.run(
        command(tiny, f"run_dir={run}", *options, ranks=1),
        env=environment(ATTNZOO_FAULT="checkpoint_write:4"),
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert killed.returncode != 0
    checkpoints = run / "checkpoints"
    assert (checkpoints / "latest").read_text().strip() == "step-00000002"
    assert (checkpoints / ".step-00000004.tmp").is_dir(), "the fault left no half-written checkpoint"
    assert not (checkpoints / "step-00000004").exists()
    assert max(losses(run)) == 4

    launch(tiny, f"run_dir={run}", *options, ranks=1)
    launch(tiny, f"run_dir={whole}", *options, ranks=1)
    assert losses(run) == losses(whole)
    assert not (checkpoints / ".step-00000004.tmp").exists()
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000004", "step-00000006"]


def test_shared_memory_is_given_back(training: Training) -> None:
    """DeepSpeed's buffers have no name while a run is on, so that not even a kill can leave them behind."""
    port = training.process.args[training.process.args.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    for rank in training.ranks:
        assert "deepspeed_allreduce_buffer" in (Path("/proc") / str(rank.pid) / "maps").read_text()


def test_a_lock_left_by_a_killed_compilation_holds_up_nobody(tiny: Path) -> None:
    """torch waits for ever for the lock file of a build whose process is gone."""
    extension = ROOT / ".cache" / "torch_extensions" / "deepspeed_shm_comm"
    extension.mkdir(parents=True, exist_ok=True)
    (extension / "lock").touch()
    launch(tiny, f"run_dir={tiny.parent / 'locked'}", "train.steps=1")
    assert not (extension / "lock").exists()
