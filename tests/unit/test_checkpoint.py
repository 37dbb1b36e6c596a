"""Models on disk: round trip, atomic replacement, and damaged or foreign files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnzoo.attention.mha import MHA
from attnzoo.checkpoint import load_model, load_tokenizer, read_metadata, save_model
from attnzoo.files import replace_directory, write_atomic
from attnzoo.models import DecoderConfig, DecoderLM
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.serving import small_model, tokenizer


class Unwritable:
    """A tokenizer whose files are gone."""

    def save(self, directory):
        raise FileNotFoundError(directory)


def build(**changes) -> DecoderLM:
    torch.manual_seed(1)
    values = {"vocab_size": 31, "model_dim": 16, "num_layers": 2, "attention": ["rcmha", "linear"]} | changes
    return DecoderLM(DecoderConfig.from_dict(values))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, tie, dtype):
    model = build(tie_embeddings=tie).to(dtype)
    save_model(tmp_path / "model", model, metadata={"steps": 3})
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    assert read_metadata(tmp_path / "model") == {"steps": 3}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert (loaded.head.weight is loaded.embedding.weight) == tie
    assert load_model(tmp_path / "model", dtype=torch.float64).embedding.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("stored", "asked", "buffer", "unsaved"),
    [
        (torch.float32, None, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float64, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64, torch.float64),
    ],
)
def test_buffers_keep_their_precision(stored, asked, buffer, unsaved, tmp_path, monkeypatch):
    """However many numbers they hold, the model's dtype is that of its weights."""
    monkeypatch.setattr(MHA, "__init__", with_buffers(MHA.__init__))
    model = build(attention="mha")
    model = model if stored == torch.float32 else model.to(stored)  # which would turn the buffers, too
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model", dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {asked or stored}
    for name, dtype in (("constants", buffer), ("derived", unsaved)):
        found, saved = (getattr(m.blocks[0].attention, name) for m in (loaded, model))
        assert found.dtype == dtype
        assert torch.equal(found, saved.to(dtype)), name


def with_buffers(init: Callable[..., None]) -> Callable[..., None]:
    def built(self: MHA, *arguments: Any) -> None:
        init(self, *arguments)
        self.register_buffer("constants", torch.arange(50_000, dtype=torch.float64) / 3)
        self.register_buffer("derived", torch.arange(3, dtype=torch.float64) / 7, persistent=False)

    return built


def test_only_three_kinds_of_file_and_no_pickle(tmp_path):
    save_model(tmp_path / "model", build())
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replacing_keeps_one_whole_model(tmp_path):
    save_model(tmp_path / "model", build(), metadata={"steps": 1})
    save_model(tmp_path / "model", build(model_dim=32), metadata={"steps": 2})
    assert load_model(tmp_path / "model").config.model_dim == 32
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failed_write_leaves_the_old_model(tmp_path):
    save_model(tmp_path / "model", build(), metadata={"steps": 1})
    with pytest.raises(FileNotFoundError):
        save_model(tmp_path / "model", build(model_dim=32), tokenizer=Unwritable())
    assert load_model(tmp_path / "model").config.model_dim == 16
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Extra(torch.nn.Module):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (torch.eye(2).to_sparse(), "odd has layout torch.sparse_coo"),
        (torch.eye(2).to_sparse_csr(), "odd has layout torch.sparse_csr"),
        (torch.empty(2, device="meta"), "odd is on the meta device"),
        (torch.zeros(2, dtype=torch.complex64), "odd has dtype torch.complex64"),
        (torch.zeros(2, dtype=torch.float8_e5m2), "odd has dtype torch.float8_e5m2"),
        (torch.nn.parameter.UninitializedBuffer(), "odd has no shape yet"),
        (Extra(), "odd._extra_state is a dict, and a checkpoint holds tensors alone"),
    ],
    ids=["sparse", "sparse rows", "meta", "complex", "eight bits", "lazy", "extra state"],
)
def test_what_no_checkpoint_can_hold_is_refused_by_name(odd, message, tmp_path):
    model = build()
    owner = model.blocks[0].attention
    if isinstance(odd, torch.Tensor):
        owner.register_buffer("odd", odd)
    else:
        owner.odd = odd
    with pytest.raises(ValueError, match=f"blocks.0.attention.{message}"):
        save_model(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


def test_write_atomic(tmp_path):
    path = tmp_path / "deep" / "latest"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["latest"]
    with pytest.raises(TypeError):
        write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["latest"]


def test_replace_directory_is_readable_by_others(tmp_path):
    (tmp_path / "new").mkdir(mode=0o700)
    replace_directory(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final").stat().st_mode & 0o777 == 0o755
    save_model(tmp_path / "model", build())
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def damaged(directory, what: str) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    content = json.loads(config.read_text())
    if what == "no weights":
        weights.unlink()
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "no config":
        config.unlink()
    elif what == "no json":
        config.write_text("{")
    elif what == "no mapping":
        config.write_text("[]")
    elif what == "other format":
        config.write_text(json.dumps(content | {"format": "attnzoo-decoder-9"}))
    elif what == "other sizes":
        content["model"]["model_dim"] = 32
        config.write_text(json.dumps(content))
    elif what == "unknown key":
        content["model"]["colour"] = "red"
        config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", r"model.safetensors does not exist; is the checkpoint complete"),
        ("cut weights", r"is not a readable safetensors file"),
        ("no config", r"config.json does not exist; give a directory"),
        ("no json", r"config.json' is not JSON"),
        ("no mapping", r"config.json' holds a list, not an object"),
        ("other format", r"format='attnzoo-decoder-9' is not"),
        (
            "other sizes",
            r"of another shape: blocks.0.attention.conv.key_kernel is \[4, 4, 3\], not \[4, 8, 3\].* and 22 more",
        ),
        ("unknown key", r"unknown key model.colour"),
    ],
)
def test_damage_is_named(tmp_path, what, message):
    save_model(tmp_path / "model", build())
    damaged(tmp_path / "model", what)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


def test_missing_tokenizer_is_named(tmp_path):
    save_model(tmp_path / "model", build())
    with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: float, dtype: torch.dtype | None):
    model = small_model("rcmha")
    name, weight = next((n, p) for n, p in model.named_parameters() if "query" in n and p.dim() == 2)
    weight[3, 5] = value
    save_model(tmp_path / "bad", model)
    with pytest.raises(ValueError, match=rf"bad: tensor {name} is not finite .*first at \[3, 5\]"):
        load_model(tmp_path / "bad", dtype=dtype)
    loaded = load_model(tmp_path / "bad", dtype=dtype, check_finite=False)
    assert not dict(loaded.named_parameters())[name].isfinite().all()


def test_weights_too_large_for_the_dtype_are_refused(tmp_path: Path):
    model = small_model("mha")
    model.head.weight[0, 0] = 1e6
    save_model(tmp_path / "large", model)
    with pytest.raises(
        ValueError, match=r"head\.weight has numbers that torch\.float16 cannot hold; load it as bfloat16"
    ):
        load_model(tmp_path / "large", dtype=torch.float16)
    assert load_model(tmp_path / "large", dtype=torch.bfloat16).head.weight[0, 0] > 9e5


def test_a_server_does_not_start_with_weights_that_are_no_numbers(tmp_path: Path):
    model = small_model("mha")
    model.norm.weight[1] = float("nan")
    save_model(tmp_path / "bad", model, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"tensor norm\.weight is not finite"):
        Engine(EngineConfig(checkpoint=str(tmp_path / "bad")))
    engine = Engine(EngineConfig(checkpoint=str(tmp_path / "bad"), check_weights=False))
    (answer,) = engine.generate([[5, 6]], SamplingParams(max_tokens=3))
    assert answer.finish_reason == "error"
    assert "logits are not finite" in answer.error
