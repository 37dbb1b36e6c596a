"""The command `attnzoo`: what it says of options written the other way, and of plain modules."""

import pytest
from torch import nn

from attnzoo.__main__ import main
from attnzoo.attention import ATTENTION


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train try.yaml", "the following arguments are required: --config: write --config try.yaml;"),
        ("plan smollm2", "the following arguments are required: --model: write --model smollm2;"),
        ("attention smollm2 text --layers 1", "unrecognized arguments: --layers 1; write layers=1; see"),
        ("generate smollm2 text --max-new-tokens=3", "--max-new-tokens=3; write max_new_tokens=3; see"),
        ("generate smollm2 --max_new_tokens 3 text", "; write max_new_tokens=3; see"),
        ("generate smollm2 text --seed", "unrecognized arguments: --seed; write seed=...; see"),
        ("generate smollm2 text --devise cpu", "; did you mean --device? see"),
        ("serve runs/demo --host 0.0.0.0", "; write host=0.0.0.0; see"),
        ("list --nothing", "unrecognized arguments: --nothing; see attnzoo list --help"),
    ],
)
def test_options_written_the_other_way(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert message in capsys.readouterr().err


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
