"""What training refuses: exit status 2, one message by rank 0, and the way out."""

import json
from pathlib import Path

import pytest

from tests.helpers.training import ROOT, launch, write_tiny
from train.data import DataConfig
from train.tokenizer import TokenizerConfig, ensure_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("refusals"))


@pytest.fixture(scope="module")
def started(tiny: Path) -> Path:
    """A run on one rank that has a checkpoint."""
    run = tiny.parent / "started"
    launch(tiny, f"run_dir={run}", "train.steps=1", ranks=1)
    return run


def refusal(config: Path, *overrides: str, ranks: int = 1, **extra: str) -> str:
    """The message on stderr. extra: environment variables."""
    result = launch(config, *overrides, ranks=ranks, status=2, **extra)
    lines = [line for line in result.stderr.splitlines() if line.startswith("train: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_only_rank_0_tells_an_unknown_key(tiny: Path) -> None:
    found = refusal(tiny, "train.stepz=1", ranks=2)
    assert found.startswith("train: command line: unknown key train.stepz; did you mean 'steps'?")


def test_batches_that_do_not_divide(tiny: Path) -> None:
    assert "train.batch_size=7 is not a multiple of train.micro_batch_size * ranks = 2 * 1 = 2" in refusal(
        tiny, "train.batch_size=7"
    )


def test_a_batch_that_the_corpus_does_not_fill(tiny: Path) -> None:
    options = ("train.batch_size=4096", f"run_dir={tiny.parent / 'wide'}")
    assert "one global batch takes 4096 blocks of 16 tokens and the corpus has" in refusal(tiny, *options, ranks=2)


def test_another_number_of_ranks(tiny: Path, started: Path) -> None:
    found = refusal(tiny, f"run_dir={started}", ranks=2)
    assert "was written by 1 rank and this run has 2" in found
    assert "checkpoint.init_from=" in found


def test_another_model_or_optimizer(tiny: Path, started: Path) -> None:
    found = refusal(tiny, f"run_dir={started}", "model.mlp=gelu")
    assert "written with model.mlp='swiglu' and this run has 'gelu'" in found


def test_a_plug_in_that_has_changed(tmp_path: Path) -> None:
    config, plugin = write_tiny(tmp_path), tmp_path / "mine.py"
    plugin.write_text((ROOT / "attnzoo" / "attention" / "_template.py").read_text("utf-8"), "utf-8")
    words = ("model.attention={kind: mine, num_heads: 2}", "train.steps=1")
    launch(config, *words, ranks=1, ATTNZOO_PLUGINS=str(plugin))
    plugin.write_text(plugin.read_text("utf-8").replace("slope", "steepness"), "utf-8")
    found = refusal(config, *words, ATTNZOO_PLUGINS=str(plugin))
    assert "mine.py has changed since " in found
    assert f"choose another name= or run_dir=, or put mine.py back, or delete {tmp_path / 'run'}" in found


def test_a_used_run_directory_with_resume_never(tiny: Path, started: Path) -> None:
    found = refusal(tiny, f"run_dir={started}", "checkpoint.resume=never")
    assert "set run_dir to a new directory" in found


def test_a_corpus_that_is_not_there(tiny: Path) -> None:
    assert "nowhere.txt" in refusal(tiny, "data.source=nowhere.txt", f"run_dir={tiny.parent / 'none'}")


def test_a_run_knows_its_text(tmp_path: Path) -> None:
    """Other text of the same size under the same path, with the same tokenizer, is not trained on in silence."""
    config = write_tiny(tmp_path)
    corpus, run = tmp_path / "corpus.txt", tmp_path / "run"
    tokenizer = ensure_tokenizer(TokenizerConfig(vocab_size=300), DataConfig(source=str(corpus)), tmp_path)
    options = (f"tokenizer.path={tokenizer}", "train.steps=2", "train.stop_at_step=1")
    first = launch(config, *options, ranks=1)
    line = f"data.source='{corpus}': 1 file read, 0 skipped, 1 document, 0 duplicates and 0 empty ones dropped"
    assert line in first.stderr
    account = json.loads((run / "training.json").read_text())["rows"][0]["data"]
    assert (account["files"], account["documents"], account["files_skipped"]) == (1, 1, {})
    corpus.write_text(corpus.read_text().replace("cat", "cow"))
    found = refusal(config, *options[:2])
    assert "was written with data (content)='" in found
    assert "choose another run_dir" in found


def test_wandb_that_is_not_installed(tiny: Path) -> None:
    assert "wandb is not installed" in refusal(tiny, "log.wandb=true")


def test_dry_run_trains_nothing(tiny: Path) -> None:
    run = tiny.parent / "dry"
    text = launch(tiny, f"run_dir={run}", "--dry-run", ranks=1).stdout
    assert "tokens per step: 128 = 8 sequences of 16, 1 rank x 4 passes of 2" in text
    assert "parameters: 22,504 in all" in text
    assert not run.exists()


def test_help_shows_examples(tiny: Path) -> None:
    assert "train/main.py --config rcmha.yaml" in launch(tiny, "--help", ranks=1).stdout
