"""A checkpoint of others under DeepSpeed: whole, and by adapters that an export has merged."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnzoo.checkpoint import load_model, load_tokenizer
from tests.helpers.foreign_tokenizers import byte_level, write
from tests.helpers.training import launch, losses, write_tiny

ADOPT = ("checkpoint.adopt_model=true", "optim.name=adamw")
LORA = ("lora.rank=4", "lora.targets=[query,down]", "optim.lr=0.05")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def source(tiny: Path) -> Path:
    """A random Llama with a tokenizer of its own."""
    backend = byte_level()
    backend.add_special_tokens(["<s>", "</s>"])
    directory = write(tiny.parent / "llama", backend)
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size() + 5,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def changed(source: Path, export: Path) -> set[str]:
    """Names of the tensors that training has changed."""
    before, after = load_model(source).state_dict(), load_model(export).state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name].float(), after[name])}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32")])
def test_adapters_change_their_targets_alone(tiny: Path, source: Path, stage: int, precision: str) -> None:
    run = tiny.parent / f"lora-{stage}"
    options = (f"zero.stage={stage}", f"precision={precision}", f"checkpoint.init_from={source}", *ADOPT, *LORA)
    launch(tiny, f"run_dir={run}", *options)
    targets = ("attention.projection.query.weight", "mlp.down.weight")
    found = changed(source, run / "export")
    if precision == "bf16":
        # Frozen weights were rounded to bfloat16 once, as all weights of such a run are.
        before, after = load_model(source).state_dict(), load_model(run / "export").state_dict()
        found = {name for name in found if not torch.equal(before[name].bfloat16().float(), after[name])}
    assert found == {f"blocks.{layer}.{target}" for layer in range(2) for target in targets}
    assert load_tokenizer(run / "export").fingerprint() == load_tokenizer(source).fingerprint()
    steps = losses(run)
    assert steps[6] < steps[1]


def test_the_export_is_the_adapted_model(tiny: Path, source: Path) -> None:
    """A run that starts from the export begins at the loss where the adapters ended."""
    run, second = tiny.parent / "whole", tiny.parent / "second"
    options = (f"checkpoint.init_from={source}", *ADOPT, *LORA, "eval.max_blocks=null")
    launch(tiny, f"run_dir={run}", *options, ranks=1)
    again = (f"checkpoint.init_from={run / 'export'}", *ADOPT, "train.steps=1", "eval.max_blocks=null")
    launch(tiny, f"run_dir={second}", *again, ranks=1)
    assert losses(second, "eval")[0] == pytest.approx(losses(run, "eval")[6], rel=1e-5)
    assert losses(run, "eval")[6] < losses(run, "eval")[0]


def test_adapters_resume(tiny: Path, source: Path) -> None:
    """Three steps and three more are six; another rank of the adapters is refused."""
    options = (f"checkpoint.init_from={source}", *ADOPT, *LORA)
    launch(tiny, f"run_dir={tiny.parent / 'six'}", *options, ranks=1)
    parts = tiny.parent / "parts"
    launch(tiny, f"run_dir={parts}", *options, "train.stop_at_step=3", ranks=1)
    refused = launch(tiny, f"run_dir={parts}", *options, "lora.rank=2", ranks=1, status=2)
    assert "written with lora.rank=4 and this run has 2" in refused.stderr
    launch(tiny, f"run_dir={parts}", *options, ranks=1)
    assert losses(parts) == losses(tiny.parent / "six")


def test_all_weights(tiny: Path, source: Path) -> None:
    run = tiny.parent / "all"
    launch(tiny, f"run_dir={run}", f"checkpoint.init_from={source}", *ADOPT, "zero.stage=3")
    assert len(changed(source, run / "export")) == len(load_model(source).state_dict())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.adopt_model=true"], "checkpoint.adopt_model=true needs checkpoint.init_from"),
        (["lora.rank=4", "optim.name=adamw"], "lora.rank needs checkpoint.init_from"),
        ([*ADOPT, "lora.rank=4", "zero.stage=3"], "zero.stage=3 does not work with lora.rank"),
        ([*ADOPT, "lora.rank=4", "lora.targets=[querry]"], "lora.targets: 'querry' is no linear map of this model"),
        ([*ADOPT, "data.isolate_documents=true"], "data.isolate_documents=true needs a tokenizer"),
        ([*ADOPT, "data.sequence_length=65"], "data.sequence_length=65 is longer than model.max_positions=64"),
        (["optim.name=adamw"], "has model.vocab_size="),
    ],
)
def test_refusals(tiny: Path, source: Path, overrides: list[str], message: str) -> None:
    if not message.endswith("needs checkpoint.init_from"):
        overrides = [*overrides, f"checkpoint.init_from={source}"]
    result = launch(tiny, f"run_dir={tiny.parent / 'refused'}", *overrides, ranks=1, status=2)
    assert message in result.stderr
