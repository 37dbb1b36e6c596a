"""From a configuration and weights to a model: what is given is taken as it is, and nothing else passes for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnzoo.attention.mha import MHA
from attnzoo.checkpoint import load_model, save_model
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes, materialise
from tests.helpers.newcomers import newcomer

GAIN, SAME = (f"blocks.0.attention.mixing.position.{name}" for name in ("gain", "same_gain"))
PASSES = "blocks.1.attention.passes"


@pytest.fixture
def model() -> Iterator[DecoderLM]:
    """Of a variant with everything that a layer may keep; its gains are no longer those it begins with."""
    with newcomer("buffered") as kind:
        made = DecoderLM(DecoderConfig(vocab_size=29, model_dim=16, num_layers=2, attention=kind))
        with torch.no_grad():
            made.get_parameter(GAIN).fill_(1.5)
        yield made


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def test_values_names_and_frozen_parameters(model: DecoderLM) -> None:
    """One name of a parameter is enough, and it has all of them afterwards."""
    weights = model.state_dict()
    made = materialise(build_shapes(model.config), without(weights, "head.weight", SAME), "cpu")
    for name, tensor in model.named_buffers():
        assert torch.equal(made.get_buffer(name), tensor), name
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = made.get_parameter(name)
        assert torch.equal(found, parameter), name
        assert found.requires_grad == parameter.requires_grad, name
    assert made.head.weight is made.embedding.weight
    assert made.get_parameter(GAIN) is made.get_parameter(SAME)
    assert made.get_parameter(GAIN).data_ptr() == weights[GAIN].data_ptr()  # not a copy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (GAIN, torch.ones(1), r"gain is \[1\], and the model's is \[\]"),
        (PASSES, torch.tensor(3.0), r"passes is torch.float32, and the model's is torch.int64"),
        (PASSES, torch.tensor(3, dtype=torch.int32), r"passes is torch.int32, and the model's is torch.int64"),
        (GAIN, torch.tensor(1), r"gain is torch.int64, and the model's is torch.float32"),
        (SAME, torch.tensor(2.0), r"gain and .*same_gain are one parameter of the model, and the weights hold two"),
        ("blocks.0.colour", torch.ones(1), r"the weights hold blocks.0.colour, which the model does not have"),
    ],
)
def test_other_tensors_are_refused(model: DecoderLM, name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        materialise(build_shapes(model.config), model.state_dict() | {name: value}, "cpu")


def test_missing_tensors_are_named(model: DecoderLM) -> None:
    for names in ((GAIN, SAME), (PASSES,)):
        with pytest.raises(ValueError, match=f"the weights lack {names[0]}"):
            materialise(build_shapes(model.config), without(model.state_dict(), *names), "cpu")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (SAME, torch.tensor(9.0), rf"{GAIN} and {SAME} are one parameter of the model"),
        (GAIN, torch.ones(1), rf"of another shape: {GAIN} is \[1\], not \[\]"),
        (PASSES, torch.tensor(3.5), f"tensor {PASSES} is torch.float32, and the model's is torch.int64"),
        (PASSES, torch.tensor(True), f"tensor {PASSES} is torch.bool, and the model's is torch.int64"),
    ],
)
def test_other_tensors_in_a_file_are_refused(
    model: DecoderLM, name: str, value: Tensor, message: str, tmp_path: Path
) -> None:
    path = save_model(tmp_path / "model", model) / "model.safetensors"
    save_file(load_file(path) | {name: value}, path)
    with pytest.raises(ValueError, match=rf"model: .*{message}"):
        load_model(tmp_path / "model")


def test_a_tensor_that_is_no_buffer_is_refused_before_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MHA.__init__

    def wrong(self: MHA, config: Any) -> None:
        right(self, config)
        self.slopes = torch.ones(3)

    monkeypatch.setattr(MHA, "__init__", wrong)
    with pytest.raises(
        ValueError, match=r"keeps slopes, a tensor that is neither .* self.register_buffer\('slopes', ...\)"
    ):
        build_shapes(DecoderConfig(vocab_size=9, model_dim=8, num_layers=1, attention="mha"))
