"""Signals and kills: no step is lost that was saved, and nothing half written is taken for a checkpoint."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from attnzoo.cli.train import launch_command
from tests.helpers.training import (
    ROOT,
    command,
    environment,
    free_port,
    launch,
    losses,
    start_ranks,
    write_tiny,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("faults"))


LONG = ("train.steps=1000000", "eval.every=null", "schedule.kind=constant")
"""Of a run that ends when it is told to."""


def wait_for_steps(run: Path, lives: Callable[[], bool]) -> None:
    deadline, metrics = time.monotonic() + 200, run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text(encoding="utf-8").count("\n") >= 3):
        assert lives(), "the run ended before its third step"
        assert time.monotonic() < deadline, "no third step in 200 s"
        time.sleep(0.1)


def saved(run: Path) -> int:
    """The step of the latest checkpoint, which must be the last recorded one."""
    name = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    step: int = json.loads((run / "checkpoints" / name / "state.json").read_text())["progress"]["step"]
    assert step == max(losses(run))
    return step


class Training:
    """A long run of the `deepspeed` command in the background."""

    def __init__(self, config: Path, run: Path) -> None:
        self.run = run
        self.process = subprocess.Popen(
            command(config, f"run_dir={run}", *LONG),
            env=environment(),
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        wait_for_steps(run, lambda: self.process.poll() is None)
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = [c for c in children if any(a.startswith("--local_rank=") for a in c.cmdline())]


@pytest.fixture
def training(tiny: Path, tmp_path: Path) -> Iterator[Training]:
    started = Training(tiny, tmp_path / "run")
    yield started
    for process in started.ranks:
        if process.is_running():
            process.kill()
    started.process.kill()
    started.process.wait()


def test_sigterm_to_one_rank_saves_and_exits_0(tiny: Path, tmp_path: Path) -> None:
    """And while the run is on, DeepSpeed's shared memory has no name, so that not even a kill can leave it behind."""
    run, port = tmp_path / "run", str(free_port())
    script = [str(ROOT / "train" / "main.py"), "--config", str(tiny), f"run_dir={run}", *LONG]
    ranks = start_ranks(script, 2, tmp_path, MASTER_PORT=port, LOCAL_SIZE="2")
    try:
        wait_for_steps(run, lambda: all(rank.is_alive() for rank in ranks))
        assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
        for rank in ranks:
            assert "deepspeed_allreduce_buffer" in (Path("/proc") / str(rank.pid) / "maps").read_text()
        ranks[1].terminate()
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    step = saved(run)
    launch(tiny, f"run_dir={run}", *LONG, f"train.stop_at_step={step + 2}")
    assert list(losses(run)) == list(range(1, step + 3))


def test_sigterm_to_the_deepspeed_command_saves(training: Training) -> None:
    training.process.terminate()
    # DeepSpeed's command has no handler: it dies by the signal. Its ranks notice, save and end by themselves.
    assert training.process.wait(timeout=60) == -signal.SIGTERM
    gone, alive = psutil.wait_procs(training.ranks, timeout=60)
    assert not alive
    assert len(gone) == 2
    assert saved(training.run) >= 3


SIGNALS = '''\
"""A signal to this process in the place that the environment names, once."""

import os
import signal

import train.checkpoint
import train.loop
from attnzoo.attention.base import ATTENTION
from attnzoo.attention.mha import MHA

ATTENTION.register("plain")(type("Plain", (MHA,), {"__doc__": "What every plug-in has: a variant."}))
validate, write = train.loop.validate, train.checkpoint.Checkpoints._write


def passes_after(go_on):
    """The signal comes in the second pass; another pass would be the first that nobody needs."""
    for number in (1, 2):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        yield go_on()
    raise AssertionError("the evaluation went on")


def evaluates(engine, size, most, go_on):
    if os.environ["IN"] != ("last" if most is None else "first"):
        return validate(engine, size, most, go_on)
    passes = passes_after(go_on)
    return validate(engine, size, most, lambda: next(passes))


def writes(self, *args):
    if os.environ["IN"] == "checkpoint":
        os.kill(os.getpid(), signal.SIGTERM)
    return write(self, *args)


train.loop.validate, train.checkpoint.Checkpoints._write = evaluates, writes
'''


def test_a_signal_in_an_evaluation_or_a_checkpoint_is_heard_at_once(tiny: Path, tmp_path: Path) -> None:
    """The evaluation is given up, the checkpoint is finished and no step follows; the same command goes on each time,
    and what one evaluation has found is not measured again."""
    (tmp_path / "signals.py").write_text(SIGNALS, encoding="utf-8")
    run, options = tmp_path / "run", ("checkpoint.every=2", "eval.every=100")

    def go(where: str) -> tuple[str, dict[str, Any]]:
        found = launch(
            tiny, f"run_dir={run}", *options, ranks=1, ATTNZOO_PLUGINS=str(tmp_path / "signals.py"), IN=where
        )
        assert "Traceback" not in found.stderr
        return found.stdout + found.stderr, json.loads((run / "training.json").read_text())["rows"][0]

    for where, step in (("first", 0), ("checkpoint", 2), ("last", 6)):
        told, row = go(where)
        assert f"stopped by SIGTERM after step {step}; the same command resumes it" in told
        assert (row["steps"], row["complete"], row["bits_per_byte"]) == (step, False, None)
        assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    told, row = go("nowhere")
    assert row["complete"]
    assert told.count(": validation ") == 1
    again, same = go("last")  # there is no last evaluation any more in which a signal could come
    assert ": validation " not in again
    assert same["bits_per_byte"] == row["bits_per_byte"]
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert list(losses(run, "eval")) == [0, 6]


def test_ranks_whose_launcher_dies_while_data_are_prepared_stop(tiny: Path, tmp_path: Path) -> None:
    """They would train to the end, and nobody would know. Here the command is that of `attnzoo train`."""
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "import train.tasks.language as language\n"
        "from attnzoo.attention import ATTENTION\n"
        "ATTENTION.register('plug')(type('Plug', (ATTENTION.get('mha'),), {'__doc__': 'A variant.'}))\n"
        "def slow(*a, prepare=language.prepare, **k):\n"
        f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "    time.sleep(3)\n"
        "    return prepare(*a, **k)\n"
        "language.prepare = slow\n",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    process = subprocess.Popen(
        launch_command(2, ["--config", str(tiny), f"run_dir={run}", *LONG]),
        env=environment(ATTNZOO_PLUGINS=str(tmp_path / "slow.py")),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, "the run ended before it prepared data"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=60)
        assert not psutil.wait_procs(family, timeout=120)[1]
    finally:
        for member in family:
            if member.is_running():
                member.kill()
        process.kill()
        process.wait()
    assert list(losses(run)) == [1]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000001"


@pytest.mark.slow
def test_ctrl_c_saves(training: Training) -> None:
    os.killpg(training.process.pid, signal.SIGINT)
    training.process.wait(timeout=60)
    assert not psutil.wait_procs(training.ranks, timeout=60)[1]
    assert saved(training.run) >= 3


def test_kill_in_the_middle_of_a_checkpoint_leaves_the_previous_one(tiny: Path) -> None:
    run, whole = tiny.parent / "killed", tiny.parent / "whole"
    options = ("checkpoint.every=2", "checkpoint.keep=2")
    launch(tiny, f"run_dir={run}", *options, ranks=1, status=-signal.SIGKILL, ATTNZOO_FAULT="checkpoint_write:4")
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


def test_a_lock_left_by_a_killed_compilation_holds_up_nobody(tiny: Path) -> None:
    """torch waits for ever for the lock file of a build whose process is gone."""
    extension = ROOT / ".cache" / "torch_extensions" / "deepspeed_shm_comm"
    extension.mkdir(parents=True, exist_ok=True)
    with (extension.parent / "guard").open("w") as guard:  # the runs of other tests load from here too: not meanwhile
        fcntl.flock(guard, fcntl.LOCK_EX)
        (extension / "lock").touch()
    launch(tiny, f"run_dir={tiny.parent / 'locked'}", "train.steps=1")
    assert not (extension / "lock").exists()
