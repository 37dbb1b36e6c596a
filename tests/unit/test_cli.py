"""The command `attnzoo`: what it prints, and how it refuses."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from attnzoo import __version__
from attnzoo.attention import ATTENTION
from attnzoo.checkpoint import save_model
from attnzoo.cli import BENCHMARKS, COMMANDS, CommandParser, arguments_of, command_tree, main, prepare_streams
from attnzoo.cli.variants import configs_with
from attnzoo.settings import parse_words, read_mapping
from tests.helpers import serving
from tests.helpers.forked import start_script

ROOT = Path(__file__).resolve().parents[2]
NAMES = [*(name for name in COMMANDS if name != "bench"), *(f"bench {name}" for name in BENCHMARKS)]


def test_list_names_every_variant_and_its_source(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for kind in ATTENTION:
        assert f"\n{kind} " in printed
        assert ATTENTION.get(kind).source in printed


def test_configs_of_a_variant_are_those_whose_attention_it_is():
    """Kills: a text found under another key, such as the kind of a schedule, or in a comment."""
    assert configs_with("rcmha") == ["configs/base.yaml", "configs/rcmha.yaml", "configs/try.yaml"]
    assert "configs/vlm-small.yaml" in configs_with("mha")  # in a mapping, and deeper than the model
    assert not configs_with("cosine")
    assert not configs_with("clinical")


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
    assert len(re.findall("(?im)^source:", printed)) == 1


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
        (["describe", "mha", "num_heads=" + "9" * 5000], "num_heads: cannot be read as YAML: Exceeds"),
        (["describe", "mha", "num_heads=" + "[" * 100_000], "num_heads: cannot be read as YAML"),
        (["describe", "mha", "rope_theta=.nan"], "rope_theta: .nan is not a finite number"),
        (["describe", "mha", "rope_theta=-.inf"], "rope_theta: -.inf is not a finite number"),
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
        (
            ["plan", "--model", "rmha.yml"],
            "no file 'rmha.yml'; give a training config (.yaml) or a checkpoint; did you mean",
        ),
        (["export", "/none", "out"], "checkpoint='/none' does not exist"),
        (["export", "smolm2", "out"], "no packaged model of that name; did you mean 'smollm2'?"),
        (["serve", "--checkpoint", "smolm2"], "no packaged model of that name; did you mean 'smollm2'?"),
        (["train", "--config", "rcmha.yaml", "train.stps=3"], "unknown key train.stps; did you mean 'steps'?"),
        (["train", "--config", "rcmah.yaml"], "--config: no file 'rcmah.yaml'; did you mean 'rcmha.yaml'?"),
        (["export", "none.gguf", "out"], "none.gguf' does not exist"),
        (["describe", "mha", 'rope_scaling={"factor": 2, "factor": 3}'], "rope_scaling: factor is set twice"),
        (["plan", "--model", "configs/mha.yaml", "--gpus", str(10**30)], "--gpus=1" + "0" * 30 + " must be at most"),
        (["export", "~no_such_user/x", "out"], "checkpoint='~no_such_user/x': there is no user '~no_such_user'"),
        (["export", "a\0b", "out"], r"checkpoint='a\x00b' contains a NUL character"),
        (
            ["export", "pyproject.toml", "out"],
            "pyproject.toml' is a file; a checkpoint is a directory, or a file whose name ends in .gguf",
        ),
        (["compare", "text=~no_such_user/x"], "text='~no_such_user/x': there is no user '~no_such_user'"),
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


def test_a_choice_that_is_none_has_the_nearest_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["reproduce", "one-step"])
    assert "experiment: no such choice 'one-step'; did you mean 'one-step-gd'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("~no_such_user/out", "OUT='~no_such_user/out': there is no user '~no_such_user'"),
        ("a\0b", r"OUT='a\x00b' contains a NUL character"),
        ("model/out", "lies in the checkpoint"),  # whose next export would be refused for it
        ("model/out/below", "lies in the checkpoint"),
        (".", "is the current directory"),  # which a shell would be left in after it is gone
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
    for words in (["export", "LOOP", "out"], ["plan", "--model", "LOOP"], ["serve", "--checkpoint", "LOOP"]):
        assert main([word.replace("LOOP", str(tmp_path / "loop")) for word in words]) == 2
        assert "/loop' is a symbolic link that leads back to itself" in capsys.readouterr().err
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


def test_words_are_yaml():
    words = ["a=1", "b=true", "c=null", "d=rope", "e=1.5", "f=no", "g={h: [1e-6, 010]}", "i==", "path=1e3"]
    assert parse_words(words, "a=1", as_text=["path"]) == {
        "a": 1, "b": True, "c": None, "d": "rope", "e": 1.5, "f": "no", "g": {"h": [1e-6, 10]}, "i": "=",
        "path": "1e3",
    }  # fmt: skip
    for word in ("a", "=1", "a..b=1", " =1"):
        with pytest.raises(ValueError, match=re.escape(f"{word!r} is not of the form key=value, for example a=1")):
            parse_words([word], "a=1")
    assert parse_words(["path=", "a=''"], "a=1", as_text=["path"]) == {"path": "", "a": ""}
    with pytest.raises(ValueError, match=r"^a= has no value; write a=null for none, or a=\"''\" for an empty text$"):
        parse_words(["a= "], "a=1")
    with pytest.raises(ValueError, match=r"^layers is given twice; keep one of them$"):
        parse_words(["layers=0", "heads=1", "layers = 1"], "a=1")


BOMB = "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghi"))
"""Nine lines that stand for millions of values."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"\xff", "is not UTF-8"),
        (b"- 1", "the file holds a list; it must be a mapping"),
        (b"a: 1\na: 2", "2: a is set twice"),
        (b"a: &a [1, 1, 1, 1, 1]\n" + BOMB.encode(), "more than 100,000 values"),
        (b"a: &a {k: 1, l: 1, m: 1, n: 1, o: 1}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}").encode(), "values"),
        (b"a: &a [*a]", "contains itself"),
    ],
)
def test_files_that_are_no_mapping(content, message, tmp_path):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:.*{re.escape(message)}"):
        read_mapping(path)


def helped(words: list[str], capsys) -> str:
    """What a command prints for --help."""
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_overview_names_every_command(capsys):
    overview, benchmarks = helped([], capsys), helped(["bench"], capsys)
    assert "examples:" in overview
    for name in NAMES:
        shown = benchmarks if name.startswith("bench ") else overview
        assert re.search(rf"^  {name.split()[-1]} +\w", shown, re.M), name
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"attnzoo {__version__}\n")


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_that_the_command_takes(name, capsys):
    printed = helped(name.split(), capsys)
    assert printed.startswith(f"usage: attnzoo {name} ")
    examples = printed[printed.index("\nexamples:\n") :]
    found = re.findall(rf"\battnzoo {name}((?: [^\n|]*)?)", examples)
    assert found
    command = BENCHMARKS[name.split()[1]] if name.startswith("bench ") else COMMANDS[name]
    for words in found:
        words = words if "$(" in words else words.partition(")")[0]  # eval "$(attnzoo ...)"
        parser = CommandParser(prog=name)
        arguments_of(command)(parser)
        parser.parse_intermixed_args(shlex.split(re.split(r" [<>] ", words)[0], comments=True))


def test_help_and_wrong_usage_load_no_torch():
    """Nor anything else that takes long: all of it in a fraction of a second."""
    wrong = [
        ["lst"],
        ["bench", "x"],
        ["bench"],
        [],
        ["train"],
        ["plan", "--gpus", "x"],
        ["--nope"],
        ["serve", "--port=x"],
    ]
    right = [[*name.split(), "--help"] for name in NAMES] + [["--help"], ["bench", "--help"], ["--version"]]
    code = """
import contextlib, io, json, sys
from attnzoo.cli import main
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            status = main(words)
        except SystemExit as error:
            status = error.code
    print(json.dumps([status, out.getvalue()]))
print(json.dumps([name for name in ("torch", "numpy", "ray", "deepspeed", "yaml", "omegaconf") if name in sys.modules]))
"""
    command = [sys.executable, "-c", code, json.dumps(wrong + right)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *answers, loaded = map(json.loads, done.stdout.splitlines())
    assert [status for status, _ in answers] == [2] * len(wrong) + [0] * len(right)
    for _, printed in answers[: len(wrong)]:
        assert re.match(r"attnzoo( \w+)*: error: .*\n\Z", printed), printed
    assert loaded == []


def test_an_unknown_command_gets_the_nearest_one(capsys):
    assert main(["generat"]) == 2
    assert capsys.readouterr().err.startswith("attnzoo: error: unknown command 'generat'; did you mean 'generate'?")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err.endswith("the package shtab is not installed; run pip install 'attnzoo'\n")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "scripts.eval_lm", raising=False)
    assert main(["eval", "x", "--tasks", "y"]) == 2
    assert "pip install 'attnzoo[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, *BENCHMARKS, "--kvpress-python", "--local-rank"):
        assert (word in script) == (word != "--local-rank")
    if shell == "bash":
        for words, expected in (
            ("be", "bench"),
            ("bench tr", "train"),
            ("serve --po", "--port"),
            ("plan --model a", "a.yaml"),
        ):
            typed = ["attnzoo", *words.split()]
            (tmp_path / "a.yaml").touch()
            state = f"COMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}"
            ask = f"{script}\n{state}; _shtab_attnzoo; echo ${{COMPREPLY[@]}}"
            done = subprocess.run(["bash"], input=ask, capture_output=True, text=True, cwd=tmp_path, check=True)
            assert done.stdout.split() == [expected]
    assert command_tree().parse_args(["bench", "train", "--quick"]).quick


def test_what_may_be_left_out_is_not_told_as_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate"])
    assert "the following arguments are required: checkpoint, prompt;" in capsys.readouterr().err


def test_streams_that_are_closed_or_narrow(monkeypatch, capsys, tmp_path):
    """A closed stream leads nowhere; text that stdout cannot encode is replaced; an old name is told in one line."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_streams()
    with sys.stdin, sys.stderr:
        print("caf\N{LATIN SMALL LETTER E WITH ACUTE}", flush=True)
        assert (raw.getvalue(), sys.stdin.read(), sys.stderr.write("x")) == (b"caf?\n", "", 1)
    assert warnings.formatwarning(FutureWarning("old"), FutureWarning, "a.py", 1) == "attnzoo: warning: old\n"
    assert "a.py:1" in warnings.formatwarning(UserWarning("other"), UserWarning, "a.py", 1)


STDOUT = """
import io, os, runpy, sys
if sys.argv.pop(1) == "closed":
    reading, writing = os.pipe()
    os.close(reading)
else:
    writing = os.open("/dev/full", os.O_WRONLY)
os.dup2(writing, 1)
buffering = int(sys.argv.pop(1))
sys.stdout = io.TextIOWrapper(open(1, "wb", buffering, closefd=False), write_through=not buffering)
sys.argv = sys.argv[1:]
sys.path[0] = os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("command", "buffering"),
    [
        (["attnzoo/__main__.py", "list"], -1),
        (["train/main.py", "--config", "base.yaml", "--dry-run"], -1),
        (["attnzoo/__main__.py", "--help"], -1),
        (["attnzoo/__main__.py", "completion", "bash"], 0),
        (["attnzoo/__main__.py", "--help"], 0),
    ],
)
def test_where_what_is_printed_cannot_be_written(command, buffering, tmp_path):
    """A reader that has read enough, as `| head`, ends a command without a word; a full disk is stdout's fault, and of
    no run directory's. A stdout without a buffer is what PYTHONUNBUFFERED gives. Kills: the help's way out, which
    flushes nothing, and argparse's, which keeps silent about errors."""
    script, errors = tmp_path / "piped.py", tmp_path / "errors"
    script.write_text(STDOUT)
    for stdout, said, status in (
        ("closed", "", 128 + signal.SIGPIPE),
        ("full", "attnzoo: error: stdout cannot be written: No space left on device\n", 1),
    ):
        process = start_script(
            [str(script), stdout, str(buffering), *command], os.environ, tmp_path / "out", errors, cwd=ROOT
        )
        process.join(60)
        assert (errors.read_text(), process.exitcode) == (said, status)


def test_an_error_that_cannot_be_said_keeps_its_status(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["describe", "rcmah"]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
