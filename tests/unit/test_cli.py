"""`python -m attnzoo`: what it prints, and how it refuses."""

import pytest

from attnzoo.__main__ import main, parse_options
from attnzoo.attention import ATTENTION


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
    ],
)
def test_wrong_usage_goes_to_stderr_with_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
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
