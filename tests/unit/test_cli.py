"""`python -m attnzoo`: what it prints, and how it refuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnzoo.__main__ import main, parse_options
from attnzoo.attention import ATTENTION
from attnzoo.checkpoint import save_model
from tests.helpers import serving


def test_list_names_every_variant_and_its_source(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for kind in ATTENTION:
        assert f"\n{kind} " in printed
        assert ATTENTION.get(kind).source in printed


def test_describe(capsys):
    options = ["num_heads=4", "num_kv_heads=2", "conv_bias=true", "conv_init=uniform"]
    assert main(["describe", "rcmha", *options, "--model-dim", "32", "--context", "100", "--dtype", "bf16"]) == 0
    printed = capsys.readouterr().out
    # 2 kv heads of 8 channels, k and v, 2 bytes; the tail: 2 rows of (4 + 2 + 2) heads of 8, 2 bytes; one int64.
    assert "64 bytes a token and 264 bytes constant; 6,664 bytes at 100 tokens" in printed
    assert "2308.03429" in printed
    assert "Differs from the paper" in printed
    assert "conv.query_bias [4, 8]" in printed
    assert "configs/rcmha.yaml" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "rcmah"], "did you mean 'rcmha'"),
        (["describe", "mha", "num_hads=4"], "did you mean 'num_heads'"),
        (["describe", "mha", "num_heads=3"], "model_dim=256 is not a multiple of num_heads=3"),
        (["describe", "mha", "num_heads"], "not of the form key=value"),
        (["describe", "mha", "--dtype", "fp23"], "unknown dtype 'fp23'"),
        (["list", "--context", "1"], "--context=1 must be at least 2"),
        (["list", "--model-dim", "0"], "must be at least 1"),
        (["list", "--model-dim", str(10**30)], "model_dim=1" + "0" * 30 + " is out of range"),
        (["describe", "mha", "--model-dim", str(10**12)], "model_dim=1000000000000 is out of range"),
        (["describe", "mha", "head_dim=" + "8" * 25], "head_dim=8888888888888888888888888 is out of range"),
        (["describe", "mha", "num_heads=" + "9" * 5000], "option 'num_heads' has a value that cannot be read (Exceeds"),
        (["describe", "mha", "num_heads=" + "[" * 100_000], "option 'num_heads' has a value that cannot be read"),
        (["describe", "mha", "rope_theta=NaN"], "rope_theta=nan must be a finite number"),
        (["describe", "mha", "rope_theta=Infinity"], "rope_theta=inf must be a finite number"),
        (["plan", "--model", "configs/mha.yaml", "--gpu-memory", "nan"], "--gpu-memory=nan must be positive"),
        (["plan", "--model", "configs/mha.yaml", "--gpu-memory", "inf"], "--gpu-memory=inf must be positive"),
        (["plan", "--model", "configs/mha.yaml", "--gpu-memory", "1e300"], "--gpu-memory=1e+300 must be positive"),
        (
            ["plan", "--model", "configs/mha.yaml", "--vocab-size", str(10**30)],
            "vocab_size=1" + "0" * 30 + " must be at",
        ),
        (["plan", "--model", "configs"], "--model: no file 'configs/config.json'"),
        (["plan", "--model", "/none/config.json"], "--model: no file '/none/config.json'"),
        (["export", "", "out"], "checkpoint='' names nothing"),
        (["export", "/none", "out"], "/none/config.json does not exist"),
        (["export", "none.gguf", "out"], "none.gguf' does not exist"),
        (["describe", "mha", 'rope_scaling={"factor": 2, "factor": 3}'], "cannot be read ('factor' is set twice"),
        (["plan", "--model", "configs/mha.yaml", "--gpus", str(10**30)], "--gpus=1" + "0" * 30 + " must be at most"),
        (["export", "~no_such_user/x", "out"], "checkpoint='~no_such_user/x': there is no user of '~no_such_user'"),
        (["export", "a\0b", "out"], r"checkpoint='a\x00b' holds a zero"),
        (
            ["export", "pyproject.toml", "out"],
            "pyproject.toml' is a file; a checkpoint is a directory, or a file whose name ends in .gguf",
        ),
        (["compare", "text=~no_such_user/x"], "text='~no_such_user/x': there is no user of '~no_such_user'"),
        (["compare", "--workers", "0"], "--workers=0 must be at least 1"),
        (["compare", "nope=1"], "nope"),
    ],
)
def test_wrong_usage_goes_to_stderr_with_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("~no_such_user/out", "OUT='~no_such_user/out': there is no user of '~no_such_user'"),
        ("a\0b", r"OUT='a\x00b' holds a zero"),
        ("model/out", "lies in the checkpoint"),  # whose next export would be refused for it
        ("model/out/below", "lies in the checkpoint"),
    ],
)
def test_an_export_that_is_out_of_place(where, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", serving.small_model("mha"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", "model", where]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", ["file/below", "n" * 300, "/proc/none", "loop", "loop/below"])
def test_an_export_that_cannot_be_written(where, tmp_path, capsys):
    save_model(tmp_path / "model", serving.small_model("mha"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to("loop")
    assert main(["export", str(tmp_path / "loop"), str(tmp_path / "out")]) == 2
    assert "loop" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "model"), str(tmp_path / where)]) == 2
    assert "give a" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "content",
    [
        b"model: [1",
        b"model: " + b"[" * 5000,
        b"\xff\xfe",
        b"model: [1]",
        b"[1]",
        b"",
        b"model: {model_dim: 6400000000000}",
    ],
)
def test_files_that_cannot_be_planned(content, tmp_path, capsys):
    for name in ("model.yaml", "model.json"):
        path = tmp_path / name
        path.write_bytes(content)
        assert main(["plan", "--model", str(path)]) == 2
        captured = capsys.readouterr()
        assert str(path) in captured.err
        assert not captured.out


def test_parse_options():
    assert parse_options(["a=1", "b=true", "c=null", "d=rope", "e=1.5"]) == {
        "a": 1, "b": True, "c": None, "d": "rope", "e": 1.5,
    }  # fmt: skip


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out


@pytest.mark.heavy
@pytest.mark.parametrize(
    "command", [["-m", "attnzoo", "list"], ["train/main.py", "--config", "base.yaml", "--dry-run"]]
)
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word(command):
    """As `| head` does once it has its lines: the pipe has no reader when the command writes."""
    reading, writing = os.pipe()
    os.close(reading)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, *command], cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
