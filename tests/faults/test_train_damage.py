"""Checkpoints that are damaged, rolled back or nameless, and run directories with awkward names."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.once import made_once
from tests.helpers.training import launch, losses, write_tiny

OPTIONS = ("checkpoint.every=2", "checkpoint.keep=3", "eval.every=null")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks with checkpoints of steps 2, 4 and 6, in a directory whose name is a pattern."""
    return made_once(tmp_path_factory, "whole [a]*", lambda run: launch(tiny, f"run_dir='{run}'", *OPTIONS))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run [b-c]"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("step-*"))


def message(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("train: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def test_damage_is_named_and_the_newest_whole_step_taken_by_key(tiny: Path, run: Path, whole: Path) -> None:
    """A flipped bit in the latest optimizer shard, a shard of step 2 in step 4's place."""
    checkpoints, shard = run / "checkpoints", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    flip(checkpoints / "step-00000006" / shard)
    shutil.copy(checkpoints / "step-00000002" / shard, checkpoints / "step-00000004" / shard)
    before = (run / "metrics.jsonl").read_bytes()
    more = (f"run_dir='{run}'", *OPTIONS, "train.steps=8")
    found = message(launch(tiny, *more, status=2).stderr)
    assert "checkpoint step-00000006 is damaged" in found
    assert f"{shard} is not what was written: its digest differs" in found
    assert f"the newest whole one is step-00000002: checkpoint.resume={checkpoints / 'step-00000002'} takes it" in found
    assert (run / "metrics.jsonl").read_bytes() == before
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000006"]

    launch(tiny, *more, "checkpoint.fallback=true", "train.steps=6")
    assert losses(run) == losses(whole)
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000006"]
    assert names(checkpoints / "set-aside-1") == ["step-00000004", "step-00000006"]
    assert (checkpoints / "set-aside-1" / "metrics.jsonl").read_bytes() == before
    assert (checkpoints / "latest").read_text() == "step-00000006\n"


def test_rolling_back_with_fewer_kept_loses_nothing(tiny: Path, run: Path, whole: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "latest").write_text("step-00000002\n")
    options = (f"run_dir='{run}'", "checkpoint.every=2", "checkpoint.keep=1", "eval.every=null")
    found = launch(tiny, *options, "train.stop_at_step=4")
    assert "set-aside-1" in found.stderr
    assert (checkpoints / "latest").read_text() == "step-00000004\n"
    assert names(checkpoints) == ["step-00000004"]
    assert names(checkpoints / "set-aside-1") == ["step-00000004", "step-00000006"]
    (checkpoints / "latest").unlink()
    assert "the newest whole one is step-00000004" in message(launch(tiny, *options, status=2).stderr)
    assert list(losses(run)) == [1, 2, 3, 4]


def test_a_checkpoint_kept_elsewhere_leaves_what_is_here(tiny: Path, run: Path, whole: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "step-00000002"
    shutil.copytree(whole / "checkpoints" / "step-00000002", kept)
    options = (f"run_dir='{run}'", "checkpoint.every=2", "checkpoint.keep=1", "eval.every=null")
    launch(tiny, *options, f"checkpoint.resume='{kept}'", "train.stop_at_step=4")
    checkpoints = run / "checkpoints"
    assert names(checkpoints) == ["step-00000004"]
    assert (checkpoints / "latest").read_text() == "step-00000004\n"
    assert names(checkpoints / "set-aside-1") == ["step-00000002", "step-00000004", "step-00000006"]
    assert names(kept.parent) == ["step-00000002"]


def test_home_and_a_second_start_while_one_runs(tiny: Path, tmp_path: Path) -> None:
    """`~` is the home directory; leftovers of a killed run go."""
    (tmp_path / "mine" / ".export.abc.tmp").mkdir(parents=True)
    launch(tiny, "run_dir=~/mine", "train.steps=1", ranks=1, HOME=str(tmp_path))
    assert (tmp_path / "mine" / "export" / "config.json").is_file()
    assert not (tmp_path / "mine" / ".export.abc.tmp").exists()
    state = json.loads((tmp_path / "mine" / "checkpoints" / "step-00000001" / "state.json").read_text())
    assert state["progress"]["step"] == 1
    assert not os.path.exists("~")
