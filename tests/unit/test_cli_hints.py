"""The command `attnzoo`: what it says of options written the other way, and of plain modules."""

import os

import pytest
from torch import nn

from attnzoo.attention import ATTENTION
from attnzoo.cli import main
from attnzoo.planner.fits import GIB
from attnzoo.planner.plan import RESERVE, least_memory


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train try.yaml", "the following arguments are required: --config: write --config try.yaml;"),
        ("eval smollm2", "the following arguments are required: --tasks; see"),
        ("generate smollm2 -x max_new_tokens=2", "-x; a text that begins with - is read from stdin: write - in its"),
        ("plan smollm2", "the following arguments are required: --model: write --model smollm2;"),
        ("attention smollm2 text --layers 1", "unrecognized arguments: --layers 1; write layers=1; see"),
        ("generate smollm2 text --max-new-tokens=3", "--max-new-tokens=3; write max_new_tokens=3; see"),
        ("generate smollm2 --max_new_tokens 3 text", "; write max_new_tokens=3; see"),
        ("generate smollm2 text --seed", "unrecognized arguments: --seed; write seed=...; see"),
        ("generate smollm2 text --devise cpu", "; did you mean --device? see"),
        ("serve runs/demo --host 0.0.0.0", "; write host=0.0.0.0; see"),
        ("list --model-dim 64 --model-dim=128", "--model-dim: is given twice; keep one of them; see"),
        ("train --config a.yaml --config b.yaml", "--config: is given twice; keep one of them; see"),
        ("describe mha --context 1e3", "--context='1e3' must be a whole number, for example 8; see"),
        ("plan --model mha.yaml --gpu-memory big", "--gpu-memory='big' must be a number, for example 0.5; see"),
        ("list --nothing", "unrecognized arguments: --nothing; see attnzoo list --help"),
    ],
)
def test_options_written_the_other_way(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench attention --threads 0 --quick", "--threads=0 must be at least 1"),
        ("bench attention --turns 0 --quick", "--turns=0 must be at least 1"),
        ("bench edits --threads -1 --quick", "--threads=-1 must be at least 1"),
        ("bench edits --turns -1", "--turns=-1 must be at least 1"),
        ("bench train --turns 0", "--turns=0 must be at least 1"),
        ("bench serve --checkpoint nope --quick", "does not exist"),
        (
            "bench cache --quick --checkpoint nope",
            "--checkpoint='nope': --quick takes tiny random models; leave out one",
        ),
        ("exam nope.csv --url http://x --max-tokens 0", "max_tokens=0 must be at least 1"),
        ("exam nope.csv --url http://x", "there is no file 'nope.csv'; give another path"),
        ("train --config rcmha.yaml --dry-run model=5", "model=5 must be a section, for example model.num_layers=4"),
        ("train --config rcmha.yaml --dry-run task=language", "must be a section, for example task.kind=language"),
        ("train --config rcmha.yaml --dry-run model.attention=[]", "command line: attention=[] names no variant"),
        ("train --config FIFO --dry-run", "FIFO' is a device or a pipe; give a file"),
        ("plan --model rcmha.yaml --vocab-size 0", "error: --vocab-size=0 must be at least 1"),
        ("plan --model rcmha.yaml --gpus 3 --nodes 2", "--nodes=2 does not divide --gpus=3"),
        ("serve", "name what to serve: attnzoo serve CHECKPOINT"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("FIFO")
    assert main(words.split()) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("need", [1, GIB // 20, 7 * GIB + 1])
def test_a_memory_that_would_fit_fits(need):
    """Kills: rounding the advice down, to 0.0 for a small model."""
    assert need <= least_memory(need) * GIB * (1 - RESERVE) < need + GIB // 10


def test_describe_of_plain_modules_is_that_of_the_class(capsys):
    class One(nn.Module):
        """Reads one way."""

        def __init__(self, model_dim: int) -> None:
            super().__init__()

        def forward(self, x_BTD):
            return x_BTD

    class Other(One):
        """Reads another way.

        Source: nowhere.
        """

    try:
        ATTENTION.register("one_way")(One)
        ATTENTION.register("another_way")(Other)
        assert main(["describe", "one_way"]) == main(["describe", "another_way"]) == 0
    finally:
        for name in ("one_way", "another_way"):
            ATTENTION.remove(name)
    printed = capsys.readouterr().out
    assert "one_way: Reads one way.\n\nsource: no source given\nfile: test_cli_hints.py" in printed
    assert "another_way: Reads another way.\n\nSource: nowhere.\n\nfile: test_cli_hints.py" in printed
