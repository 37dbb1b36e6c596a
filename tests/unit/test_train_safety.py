"""What keeps a run from harm, without training: digests, run directories, finite checks, metrics."""

import fcntl
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from attnzoo.models import build_shapes
from tests.helpers.training import ROOT, write_tiny
from train import checkpoint
from train.checkpoint import Checkpoints, find_resume, newest_whole, steps_in
from train.config_layers import ConfigError
from train.config_reader import load_config
from train.digests import check_files, digest_files, write_digests
from train.failures import explain
from train.finite import GradientCheck, describe, finite_or_none, first_non_finite
from train.metrics import MetricsWriter
from train.ranks import check_port, threads_of_rank
from train.run_directory import _tidy_run, check_space, checkpoint_bytes, locked, preparing


def make_checkpoint(directory: Path, step: int) -> Path:
    """Files as a checkpoint has them, with digests."""
    path = directory / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"progress": {"step": step}}))
    (path / "model.pt").write_bytes(bytes(range(200)) + step.to_bytes(4, "big"))
    (path / "optim.pt").write_bytes(step.to_bytes(4, "big") * 50)
    write_digests(path, digest_files(path))
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit in the model": (lambda p: flip(p / "model.pt"), "model.pt is not what was written"),
    "a flipped bit in the optimizer": (lambda p: flip(p / "optim.pt"), "optim.pt is not what was written"),
    "a flipped bit in the progress": (lambda p: flip(p / "state.json"), "state.json is not what was written"),
    "cut": (lambda p: os.truncate(p / "model.pt", 100), "model.pt has 100 bytes instead of 204"),
    "longer": (lambda p: (p / "model.pt").write_bytes(b"x" * 205), "model.pt has 205 bytes instead of 204"),
    "emptied": (lambda p: os.truncate(p / "optim.pt", 0), "optim.pt has 0 bytes"),
    "deleted": (lambda p: (p / "optim.pt").unlink(), "optim.pt is missing"),
    "foreign": (lambda p: (p / "other.pt").touch(), "other.pt is no file of this checkpoint"),
    "foreign, below": (lambda p: (p / "sub").mkdir() or (p / "sub" / "x").touch(), "sub/x is no file of this"),
    "a shard of another step": (
        lambda p: shutil.copy(p.parent / "step-00000001" / "optim.pt", p / "optim.pt"),
        "optim.pt is not what was written",
    ),
    "a link to nothing": (lambda p: (p / "optim.pt").unlink() or (p / "optim.pt").symlink_to("gone"), "optim.pt"),
    "digests deleted": (lambda p: (p / "digests.json").unlink(), "digests.json is missing"),
    "digests emptied": (lambda p: (p / "digests.json").write_text(""), "digests.json cannot be read"),
    "digests of another kind": (lambda p: (p / "digests.json").write_text("[1]"), "digests.json cannot be read"),
    "digests without files": (lambda p: (p / "digests.json").write_text("{}"), "digests.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_digests_name_the_damaged_file(tmp_path: Path, damage: str) -> None:
    make_checkpoint(tmp_path, 1)
    path = make_checkpoint(tmp_path, 2)
    check_files(path)
    harm, message = DAMAGES[damage]
    harm(path)
    with pytest.raises((ValueError, OSError), match=message):
        check_files(path)
    assert newest_whole(tmp_path) == tmp_path / "step-00000001"


def test_ranks_share_the_digests(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    shares = [digest_files(path, share, 2) for share in range(2)]
    assert {**shares[0], **shares[1]} == digest_files(path)
    assert not shares[0].keys() & shares[1].keys()
    flip(path / "optim.pt")
    found = []
    for share in range(2):
        try:
            check_files(path, share, 2)
        except ValueError as error:
            found.append(str(error))
    assert len(found) == 1
    (path / ".nfs0001").touch()  # what file systems and editors leave is none of ours
    write_digests(path, digest_files(path))
    check_files(path)


def test_steps_without_a_pointer_are_refused(tmp_path: Path) -> None:
    here = Checkpoints(tmp_path, 1, {})
    assert here.latest() is None
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    flip(tmp_path / "step-00000003" / "model.pt")
    with pytest.raises(ValueError, match=r"no file latest .* newest whole one is step-00000002: checkpoint.resume="):
        here.latest()
    with pytest.raises(ValueError, match="no file latest"):
        find_resume(here, "auto", False)
    assert find_resume(here, "auto", True) == tmp_path / "step-00000002"
    for name in ("step-00000007", "", "..", "../other", "step-1", "\0"):
        (tmp_path / "latest").write_text(name)
        with pytest.raises(ValueError, match="which is no checkpoint there; the newest whole one is step-00000002"):
            here.latest()
    (tmp_path / "latest").write_text("step-00000001\n")
    assert here.latest() == tmp_path / "step-00000001"
    with pytest.raises(ValueError, match=r"checkpoint\.resume=never"):
        find_resume(here, "never", False)


def test_a_renamed_step_is_refused_by_name(tmp_path: Path) -> None:
    """Swapped names, whole files: what is in step 2 would be trained from step 3 on."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    names = [tmp_path / f"step-0000000{n}" for n in (2, 3, 9)]
    for old, new in ((names[0], names[2]), (names[1], names[0]), (names[2], names[1])):
        old.rename(new)
    with pytest.raises(ValueError, match=r"step-00000003 holds step 2: .* its name back, step-00000002"):
        checkpoint.check_whole(names[1])
    assert newest_whole(tmp_path) == tmp_path / "step-00000001"
    checkpoint.check_whole(names[0].rename(tmp_path / "copy"))  # any other name says nothing


def test_later_steps_are_set_aside_and_none_is_lost(tmp_path: Path) -> None:
    directory, records = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    for step in (2, 4, 6):
        make_checkpoint(directory, step)
    (directory / "latest").write_text("step-00000006\n")
    records.write_text("records\n")
    here = Checkpoints(directory, 1, {})
    assert here.set_aside(directory / "step-00000006", [records]) is None
    aside = here.set_aside(directory / "step-00000002", [records])
    assert aside == directory / "set-aside-1"
    assert sorted(p.name for p in aside.iterdir()) == ["metrics.jsonl", "step-00000004", "step-00000006"]
    check_files(aside / "step-00000006")
    assert here.latest() == directory / "step-00000002"
    new = make_checkpoint(directory, 3)
    here._delete_old(new)
    assert steps_in(directory) == [new]
    # From elsewhere: nothing here is of its history.
    foreign = make_checkpoint(tmp_path / "backup", 2)
    assert here.set_aside(foreign, [records]) == directory / "set-aside-2"
    assert here.latest() is None
    check_files(directory / "set-aside-2" / "step-00000003")


def test_steps_are_numbers_and_links_are_followed(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step-00000008").touch()
    (tmp_path / "step-9").mkdir()
    assert [p.name for p in steps_in(tmp_path)] == ["step-00000007", "step-99999999", "step-100000000"]
    (tmp_path / "link").symlink_to(tmp_path / "step-99999999")
    here = Checkpoints(tmp_path, 1, {})
    found = find_resume(here, str(tmp_path / "link"), False)
    assert found == tmp_path / "step-99999999"
    assert newest_whole(tmp_path, found) == tmp_path / "step-00000007"
    assert here.set_aside(found, []) == tmp_path / "set-aside-1"
    assert here.latest() == found
    # A copy beside the steps is none of them.
    copy = Path(shutil.copytree(found, tmp_path / "copy"))
    here.set_aside(copy, [])
    assert here.latest() is None
    check_files(tmp_path / "set-aside-2" / "step-00000007")


@pytest.mark.heavy
def test_a_run_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from train.run_directory import locked
with locked(Path({str(run)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"run_dir=.* is in use .*host .*, pid {other.pid}\)"), locked(run):
            pass
        other.kill()
    with locked(run):
        assert str(os.getpid()) in (run / ".lock").read_text()


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"run_dir=.*cannot be used .*set run_dir and cache_dir to"), locked(path):
            pass


def test_leftovers_of_killed_runs_go_and_whole_exports_come_back(tmp_path: Path) -> None:
    for left in (".export.abc.tmp", "checkpoints/.step-00000004.tmp", ".export.def.old/export"):
        (tmp_path / left).mkdir(parents=True)
    (tmp_path / ".export.def.old/export/config.json").touch()
    (tmp_path / ".metrics.jsonl.x.tmp").touch()
    (tmp_path / "checkpoints/.latest.y.tmp").touch()
    mine = [".notes.old", ".notes.tmp", ".other.x.old", "notes.tmp"]
    for name in mine:
        (tmp_path / name).touch()
    _tidy_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*mine[:3], "checkpoints", "export", mine[3]]
    assert not list((tmp_path / "checkpoints").iterdir())
    assert (tmp_path / "export/config.json").is_file()


def test_leftovers_in_the_cache_go_when_nobody_prepares(tmp_path: Path) -> None:
    left = tmp_path / "tokens" / ".0123.abc.tmp"
    left.mkdir(parents=True)
    with (tmp_path / ".preparing").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with preparing(tmp_path):
            assert left.exists()
    with preparing(tmp_path):
        assert not left.exists()


def test_space_for_the_checkpoints_is_looked_for(tmp_path: Path) -> None:
    config = load_config(str(write_tiny(tmp_path)), [])
    check_space(config, build_shapes(config.model_config(300)))
    huge = load_config(str(tmp_path / "tiny.yaml"), ["model.model_dim=200000", "model.num_layers=90"])
    with pytest.raises(ValueError, match=r"run_dir=.*3 checkpoints of .* MiB .* are free; .*checkpoint.keep=2"):
        check_space(huge, build_shapes(huge.model_config(300)))


@pytest.mark.parametrize(
    ("settings", "bytes_per_parameter"),
    [
        (["optim.name=adamw", "zero.stage=0"], 12),
        (["optim.name=adamw", "zero.stage=1"], 16),
        (["optim.name=adamw", "precision=bf16"], 14),
    ],
)
def test_bytes_of_a_checkpoint(tmp_path: Path, settings: list[str], bytes_per_parameter: int) -> None:
    config = load_config(str(write_tiny(tmp_path)), settings)
    model = build_shapes(config.model_config(300))
    assert checkpoint_bytes(config, model) == bytes_per_parameter * model.num_parameters()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("base.yaml", ["run_dir=~/runs/x", "cache_dir=~/cache"])
    assert config.run_path == tmp_path / "runs" / "x"
    assert config.cache_path == tmp_path / "cache"
    with pytest.raises(ConfigError, match="run_dir='~nobody-of-this-name/x': there is no user"):
        load_config("base.yaml", ["run_dir=~nobody-of-this-name/x"])
    assert load_config("base.yaml", ["run_dir=./~nobody-of-this-name/x"]).run_path == Path("~nobody-of-this-name/x")


def test_a_gradient_that_is_not_finite_has_a_name() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    watch = GradientCheck(model)
    model(torch.ones(2, 3)).sum().backward()
    assert watch.names() == []
    # The second layer's input is infinite: so is the gradient of its weight, not that of its bias.
    (model[1](model[0](torch.ones(2, 3)) * math.inf).sum() * 1.0).backward()
    names = watch.names()
    assert "1.weight" in names
    assert "1.bias" not in names
    assert watch.names() == []
    # The first of two passes counts too.
    (model(torch.ones(2, 3)) * math.nan).sum().backward()
    model(torch.ones(2, 3)).sum().backward()
    assert set(watch.names()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_kind_of_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    fine, broken = torch.zeros(7, 11, dtype=dtype), torch.zeros(7, 11, dtype=dtype)
    broken[6, 10] = value
    named = [("none", torch.zeros(0)), ("steps", torch.tensor(3)), ("fine", fine), ("broken", broken)]
    assert first_non_finite(named[:3]) is None
    assert first_non_finite(named) == "broken"
    text = describe(5, [1.0, float(value)], [[], ["a.weight", "b"]])
    assert text == (
        f"step 5: the loss of rank 1 is {value}; the gradient of a.weight and 1 more on rank 1 is not finite"
    )
    assert finite_or_none(value) is None


def test_metrics_hold_no_bare_nan(tmp_path: Path) -> None:
    config = load_config(str(write_tiny(tmp_path)), [f"run_dir={tmp_path / 'run'}", "log.tensorboard=true"])
    metrics = MetricsWriter(config, 0)
    for step in (1, 2, 3):
        metrics.write("train", step, {"loss": math.nan if step == 2 else 1.5, "gradient_norm": math.inf})
    metrics.rewind(2)
    metrics.write("train", 3, {"loss": -math.inf, "gradient_norm": 1.0})
    metrics.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [r["loss"] for r in records] == [1.5, None, None]
    assert [r["gradient_norm"] for r in records] == [None, None, 1.0]


def test_samples_are_cut_back_to_the_byte(tmp_path: Path) -> None:
    """What a kill left, half a character too, is no reason to stop."""
    config = load_config(str(write_tiny(tmp_path)), [f"run_dir={tmp_path / 'run'}"])
    samples = tmp_path / "run" / "samples.txt"
    samples.parent.mkdir()
    samples.write_bytes(b"=== step 2 ===\nwas \xc3\r\n=== step 3 ===\nlater\n")
    MetricsWriter(config, 2).close()
    assert samples.read_bytes() == b"=== step 2 ===\nwas \xc3\r\n"


def test_errors_of_the_system_are_one_line_with_a_way_out(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "x"))
    assert (
        explain(full)
        == f"{tmp_path / 'x'}: No space left on device; make space, or set run_dir and cache_dir to a larger disk"
    )
    assert "that this user may write to" in explain(OSError(30, "Read-only file system", "/x"))
    assert explain(ValueError("a mistake")) == "a mistake"


def test_a_rank_does_not_join_another_run_at_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that begin at once: rank 1 waits for a process of its own launcher, and goes to no other one."""
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("train.ranks.find_launcher", lambda: (1, 1))
    with pytest.raises(ValueError, match=r"port 0 is no place .* give a free port, for example \d+"):
        check_port()
    code = (
        "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        monkeypatch.setenv("MASTER_PORT", other.stdout.readline().strip())
        with pytest.raises(ValueError, match="is in use, perhaps by another training: start with deepspeed --master_"):
            check_port()
    with socket.create_server(("", 0)) as own:  # a child of this process's parent, as rank 0 is of rank 1's
        monkeypatch.setenv("MASTER_PORT", str(own.getsockname()[1]))
        check_port()


@pytest.mark.parametrize(
    ("environment", "asked", "expected"),
    [
        ({"LOCAL_SIZE": "2"}, None, "half"),
        ({"LOCAL_SIZE": "1000"}, None, 1),
        ({"LOCAL_SIZE": "2"}, 3, 3),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "5"}, None, None),
        ({}, None, None),
        ({}, 2, 2),
    ],
)
def test_ranks_share_the_cores_of_their_machine(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: int | None, expected: int | str | None
) -> None:
    for name in ("LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert threads_of_rank(asked) == (half if expected == "half" else expected)
