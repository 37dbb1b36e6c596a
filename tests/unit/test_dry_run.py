"""`--dry-run` and the run itself refuse the same, before anything is prepared."""

from pathlib import Path

import pytest
import torch

from attnzoo.checkpoint import save_model
from attnzoo.models import DecoderConfig, DecoderLM
from tests.training import write_tiny
from train.data import DataConfig
from train.main import main
from train.tokenizer import TokenizerConfig, ensure_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dry"))


@pytest.fixture(scope="module")
def exported(tiny: Path) -> Path:
    """An export with another width."""
    from attnzoo.tokenizer import load_tokenizer

    path = ensure_tokenizer(
        TokenizerConfig(vocab_size=300), DataConfig(source=str(tiny.parent / "corpus.txt")), tiny.parent
    )
    torch.manual_seed(0)
    model = DecoderLM(
        DecoderConfig(vocab_size=300, model_dim=12, num_layers=1, attention={"kind": "mha", "num_heads": 2})
    )
    save_model(tiny.parent / "export", model, tokenizer=load_tokenizer(path))
    return tiny.parent / "export"


REFUSED = [
    (["data.sequence_length=17"], "data.sequence_length=17 is longer than model.max_positions=16"),
    (["data.source=nowhere.txt"], "data.source='nowhere.txt' does not exist"),
    (["data.source={dir}/tiny.yaml"], "unknown kind of file '.yaml'"),
    (["data.source={dir}/empty"], "holds no file of a known kind"),
    (["tokenizer.path=nowhere.model"], "nowhere.model"),
    (["checkpoint.init_from={dir}/nowhere"], "nowhere"),
    (["checkpoint.init_from={dir}/nowhere", "checkpoint.adopt_model=true"], "nowhere"),
    (["checkpoint.init_from={dir}/export"], "has model.model_dim=12 and this run has 24"),
    (["model.attention_impl=triton"], "impl='triton' on a CPU"),
    (["data.source=retrieval"], "data.sequence_length=16 is too short for data.source='retrieval'"),
    (
        [
            "checkpoint.init_from={dir}/export",
            "checkpoint.adopt_model=true",
            "lora.rank=2",
            "optim.name=adamw",
            "lora.targets=[querry]",
        ],
        "lora.targets: 'querry' is no linear map of this model",
    ),
    (["train.batch_size=7"], "train.batch_size=7 is not a multiple"),
]


@pytest.mark.parametrize(("overrides", "expected"), REFUSED)
@pytest.mark.parametrize("dry", [True, False])
def test_both_refuse(
    tiny: Path,
    exported: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    expected: str,
    dry: bool,
) -> None:
    directory = exported.parent
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (directory / "empty").mkdir(exist_ok=True)
    given = [text.format(dir=directory) for text in overrides]
    before = sorted(path for path in directory.rglob("*"))
    assert main(["--config", str(tiny), *(["--dry-run"] if dry else []), *given]) == 2
    found = capfd.readouterr()
    assert found.err.startswith("train: ")
    assert found.err.count("\n") == 1
    assert expected in found.err
    assert sorted(path for path in directory.rglob("*")) == before, "something was prepared"


def test_what_can_run_is_described(tiny: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["checkpoint.adopt_model=true", "lora.rank=2", "optim.name=adamw", "model.attention_impl=reference"]
    for given in ([], [f"checkpoint.init_from={exported}", *options]):
        assert main(["--config", str(tiny), "--dry-run", *given]) == 0
        assert "tokens per step: 128" in capsys.readouterr().out
