"""Weights and the plug-in file that they were trained with: a changed formula is noticed, a reworded comment is not."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import torch

from attnzoo.checkpoint import load_model, open_checkpoint, save_model
from attnzoo.checkpoint.sources import plugin_sources
from attnzoo.errors import ChangedSourceWarning
from attnzoo.models import DecoderConfig, DecoderLM
from tests.helpers.newcomers import plugged_in
from train.checkpoint import FORMAT, PLUGINS, Checkpoints, load_weights
from train.engine import TrainingEngine
from train.failures import AgreedError

PLAIN = '''"""Scales what it reads."""

from torch import nn

from attnzoo.attention import ATTENTION


@ATTENTION.register("scaled")
class Scaled(nn.Module):
    """A factor."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(model_dim, model_dim)

    def forward(self, x_BTD):
        return 2 * self.map(x_BTD)  # twice
'''
SAME = PLAIN.replace("# twice", "# two times").replace("A factor.", "Another word.").replace("2 * self", "(2) * self")
OTHER = PLAIN.replace("2 * self", "3 * self")


@contextmanager
def model(directory: Path, text: str) -> Iterator[DecoderLM]:
    """A model of the variant in `text`, which is forgotten after."""
    directory.mkdir()
    (directory / "scaled.py").write_text(text, encoding="utf-8")
    with plugged_in(directory / "scaled.py", "scaled"):
        torch.manual_seed(0)
        config = {"vocab_size": 11, "model_dim": 8, "num_layers": 2, "attention": ["scaled", "linear"]}
        yield DecoderLM(DecoderConfig.from_dict(config))


def test_an_export_knows_its_formula(tmp_path: Path) -> None:
    export_model = pytest.importorskip("attnzoo.hf").export_model
    with model(tmp_path / "first", PLAIN) as lm:
        save_model(tmp_path / "run", lm)
        export_model(tmp_path / "hf", lm)
        for name in ("run", "hf"):
            assert json.loads((tmp_path / name / "config.json").read_text())["plugins"].keys() == {"scaled"}
    with model(tmp_path / "same", SAME):
        load_model(tmp_path / "run")  # a warning would be an error
        load_model(tmp_path / "hf")
    with model(tmp_path / "other", OTHER):
        for name in ("run", "hf"):
            message = rf"^scaled\.py has changed since \S*{name} was written: .* another scaled\. Put the file back"
            with pytest.warns(ChangedSourceWarning, match=message):
                load_model(tmp_path / name)
        from transformers import AutoModelForCausalLM

        with pytest.warns(ChangedSourceWarning, match="scaled"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        content = json.loads((tmp_path / "run" / "config.json").read_text())
        del content["plugins"]  # as earlier versions wrote it
        (tmp_path / "run" / "config.json").write_text(json.dumps(content))
        open_checkpoint(tmp_path / "run")


def test_a_run_resumes_with_its_formula_alone(tmp_path: Path) -> None:
    step = tmp_path / "runs" / "mine" / "checkpoints" / "step-00000060"
    step.mkdir(parents=True)

    def settings(lm: DecoderLM) -> dict[str, object]:
        return {"ranks": 1, PLUGINS: plugin_sources(lm)}

    with model(tmp_path / "first", PLAIN) as lm:
        saved = {"format": FORMAT, "settings": settings(lm)}
        (step / "state.json").write_text(json.dumps(saved), encoding="utf-8")
    with model(tmp_path / "same", SAME) as lm:
        assert Checkpoints(step.parent, 1, settings(lm)).read(step) == saved
    with (
        model(tmp_path / "other", OTHER) as lm,
        pytest.raises(ValueError, match=r"scaled\.py has changed since") as info,
    ):
        Checkpoints(step.parent, 1, settings(lm)).read(step)
    way_out = f"choose another name= or run_dir=, or put scaled.py back, or delete {step.parent.parent}"
    assert f"was written, by another 'scaled'; {way_out}" in str(info.value)


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    """What no digest knows, a variant of the tree that was edited, is told as well."""
    step = tmp_path / "mine" / "checkpoints" / "step-00000060"

    class Engine:
        def load(self, path: Path) -> None:
            torch.nn.Linear(2, 2).load_state_dict({"weights": torch.zeros(2, 2)})

    with pytest.raises(AgreedError, match=r"choose another name= or run_dir=, or delete .*Missing key\(s\)") as info:
        load_weights(cast(TrainingEngine, Engine()), step)
    assert info.value.status == 2


def test_built_in_variants_have_no_entry() -> None:
    lm = DecoderLM(DecoderConfig.from_dict({"vocab_size": 11, "model_dim": 8, "num_layers": 1, "attention": "mha"}))
    assert plugin_sources(lm) == {}


def test_the_command_says_it_in_one_line() -> None:
    from attnzoo.cli import prepare_streams

    usual = warnings.formatwarning
    try:
        prepare_streams()
        said = warnings.formatwarning(ChangedSourceWarning("mine.py has changed"), ChangedSourceWarning, "a.py", 1)
    finally:
        warnings.formatwarning = usual
    assert said == "attnzoo: warning: mine.py has changed\n"
