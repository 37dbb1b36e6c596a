"""Whole runs on two ranks (`pytest -s` shows the losses that are compared)."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnzoo.checkpoint import load_model, load_tokenizer, read_metadata
from attnzoo.models import generate
from attnzoo.types import build_config
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.newcomers import NEWCOMERS, newcomer
from tests.helpers.once import made_once
from tests.helpers.training import launch, losses, write_tiny
from train.config_reader import load_config
from train.data import DataConfig, prepare

FREE = "train.gradient_clipping=1000"
"""The stages add the squares of the gradient's norm in different orders, which a clipped step would show."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a tiny run; its tokenizer and tokens are prepared once."""
    return write_tiny(tmp_path_factory.mktemp("training"))


Runner = Callable[..., Path]


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs a training once for each set of options; returns its run directory."""

    def run(*overrides: str, ranks: int = 2) -> Path:
        key = hashlib.sha256(repr((overrides, ranks)).encode()).hexdigest()[:12]
        return made_once(
            tmp_path_factory,
            f"trained-{key}",
            lambda directory: launch(tiny, f"run_dir={directory}", *overrides, ranks=ranks),
        )

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def assert_same(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert losses(left, "eval") == losses(right, "eval")
    mine, theirs = weights(left), weights(right)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_zero_0_and_1_agree_bit_for_bit_with_accumulation(trained: Runner) -> None:
    left, right = (trained(FREE, f"zero.stage={stage}") for stage in (0, 1))
    assert len(losses(left)) == 6
    assert_same(left, right)
    norms = [losses(run, field="gradient_norm") for run in (left, right)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_zero_1_and_2_agree_bit_for_bit_in_one_pass(trained: Runner) -> None:
    # With accumulation they sum over ranks and passes in different orders.
    left, right = (trained(FREE, f"zero.stage={stage}", "train.micro_batch_size=4") for stage in (1, 2))
    assert_same(left, right)


def test_zero_3_agrees_to_rounding(trained: Runner) -> None:
    # ZeRO 3's hooks change the order in which autograd adds the gradients that reach a layer's input from its query,
    # key and value maps, so the last bit of a gradient differs, on one rank as on two.
    left, right = (trained(FREE, f"zero.stage={stage}", "train.micro_batch_size=4") for stage in (2, 3))
    assert losses(left) == pytest.approx(losses(right), rel=1e-6)
    mine, theirs = weights(left), weights(right)
    assert all(torch.allclose(mine[name], theirs[name], rtol=0, atol=2e-6) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_combination_learns_and_resumes(trained: Runner, precision: str, optimizer: str, stage: int) -> None:
    options = (f"precision={precision}", f"optim.name={optimizer}", f"zero.stage={stage}")
    whole, split = trained(*options), trained(*options, "train.stop_at_step=3")
    config = split / "config.yaml"
    launch(config, "train.stop_at_step=null")
    assert_same(whole, split)
    assert losses(whole)[6] < losses(whole)[1] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing_much(trained: Runner, stage: int) -> None:
    options = ("optim.name=adamw", f"zero.stage={stage}")
    plain, offloaded = trained(*options), trained(*options, "zero.offload_optimizer=true")
    assert losses(offloaded) == pytest.approx(losses(plain), rel=1e-5)


def test_bf16_stays_near_fp32(trained: Runner) -> None:
    full, low = losses(trained(FREE, "zero.stage=1")), losses(trained(FREE, "zero.stage=1", "precision=bf16"))
    assert low != full
    # bfloat16 has 8 bits of mantissa: 0.4 % a rounding, on losses that fall by 15 %.
    assert low == pytest.approx(full, rel=0.01)


def test_accumulated_passes_equal_one_pass(trained: Runner) -> None:
    two, one = trained(FREE, "zero.stage=1"), trained(FREE, "zero.stage=1", "train.micro_batch_size=4")
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)


def test_one_rank_sees_the_same_batches(trained: Runner) -> None:
    two, one = trained(FREE, "zero.stage=1"), trained(FREE, "zero.stage=1", ranks=1)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)


def test_activation_checkpointing_changes_no_bit(trained: Runner) -> None:
    two = trained(FREE, "zero.stage=1", ranks=1)
    assert_same(two, trained(FREE, "zero.stage=1", "train.activation_checkpointing=true", ranks=1))


def test_resume_is_bit_exact(trained: Runner, tiny: Path) -> None:
    whole = trained(FREE, "zero.stage=1")
    split = tiny.parent / "split"
    options = (FREE, "zero.stage=1", f"run_dir={split}")
    launch(tiny, *options, "train.stop_at_step=3")
    first = losses(split)
    assert list(first) == [1, 2, 3]
    again = launch(tiny, *options, "train.stop_at_step=2")  # where it has been: nothing is done
    assert "stopped by train.stop_at_step=2 after step 3; raise it or leave it out to go on" in again.stdout
    assert losses(split) == first
    launch(tiny, *options)
    print("\nuninterrupted:", *losses(whole).values())
    print("3 + 3 steps:  ", *losses(split).values())
    assert_same(whole, split)
    for rank in range(2):
        name = f"checkpoints/step-00000006/random-{rank}.safetensors"
        mine, theirs = load_file(split / name), load_file(whole / name)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    before = (split / "metrics.jsonl").read_text()
    again = launch(tiny, *options)  # a finished run, asked for again, changes nothing, and measures nothing
    assert "validation" not in again.stderr
    assert (split / "metrics.jsonl").read_text() == before
    states = [json.loads((r / "checkpoints/step-00000006/state.json").read_text()) for r in (whole, split)]
    assert states[0]["progress"]["data"] == states[1]["progress"]["data"]
    assert len(set(losses(whole).values())) == 6


def test_a_run_directory_holds_what_it_promises(trained: Runner) -> None:
    run = trained(FREE, "zero.stage=1")
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "export", "loss.png", "training.json"}
    assert expected <= {path.name for path in run.iterdir()}
    row = json.loads((run / "training.json").read_text())["rows"][0]
    assert row["steps"] == 6
    assert row["bits_per_byte"] < json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["bits_per_byte"]
    assert not list(run.glob("export/*.pt"))
    assert read_metadata(run / "export")["bits_per_byte"] == row["bits_per_byte"]
    tokenizer = load_tokenizer(run / "export")
    (tokens,) = generate(load_model(run / "export"), [tokenizer.encode("the cat", bos=True)], max_new_tokens=3)
    assert len(tokens) == 3


def test_the_last_evaluation_covers_all_validation_text(trained: Runner, tiny: Path) -> None:
    """Bits per byte in the report, summed up anew from the export: all nats over all bytes of the validation text."""
    run = trained(FREE, "zero.stage=1")
    config = load_config(str(tiny), [])
    data_config = build_config(DataConfig, {"seed": config.seed, **config.data}, "data")
    # is_main: another process may have trained, with a cache of its own.
    data = prepare(data_config, run / "export" / "tokenizer.model", config.cache_path, is_main=True)
    tokens, targets = data.validation_blocks()
    assert len(tokens) > config.eval.max_blocks
    with torch.no_grad():
        logits = load_model(run / "export")(tokens)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    text = load_tokenizer(run / "export").decode(targets.flatten().tolist())
    bits = json.loads((run / "training.json").read_text())["rows"][0]["bits_per_byte"]
    assert bits == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_init_from_starts_at_the_exports_loss(trained: Runner, tiny: Path) -> None:
    source = trained(FREE, "zero.stage=1")
    run = tiny.parent / "second"
    options = ("train.steps=1", "eval.max_blocks=null", f"checkpoint.init_from={source / 'export'}")
    launch(tiny, f"run_dir={run}", *options, ranks=1)
    assert losses(run, "eval")[0] == pytest.approx(losses(source, "eval")[6], rel=1e-6)
    wrong = launch(
        tiny,
        f"run_dir={tiny.parent / 'third'}",
        "model.mlp=gelu",
        f"checkpoint.init_from={source / 'export'}",
        ranks=1,
        status=2,
    )
    assert "has model.mlp='swiglu' and this run has 'gelu'" in wrong.stderr


def test_buffers_and_frozen_parameters_reach_the_export(tiny: Path) -> None:
    """A variant outside the tree that keeps every kind of tensor: a whole run, loaded, generated from. (Every stage,
    and going on from a checkpoint: test_train_steps.)"""
    run, attention = tiny.parent / "buffered", "model.attention={kind: buffered, num_heads: 2}"
    settings = (attention, "zero.stage=3", "train.steps=2", "eval.every=2")
    launch(tiny, f"run_dir={run}", *settings, ranks=1, ATTNZOO_PLUGINS=str(NEWCOMERS / "buffered.py"))
    with newcomer("buffered"):
        model = load_model(run / "export")
    attention, passes = model.layers()[1].attention, 2 * 8 // 2
    position = attention.mixing.position
    assert (attention.passes.item(), position.slopes.tolist()) == (passes, [0.0625, 0.00390625])
    assert (position.signs.tolist(), position.whole.tolist(), position.enabled.item()) == ([-1, 1], [0, 1], True)
    assert position.frozen.tolist() == [[0.5], [0.5]]
    assert position.gain.shape == ()
    assert position.gain.item() != 1.0
    assert len(generate(model, [[5, 6]], max_new_tokens=3)[0]) == 3


def test_a_forward_alone_is_trained_and_served(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plain module: a whole run, its export loaded and served, and who serves it is told that it is slow."""
    run, attention = tiny.parent / "plain", "model.attention={kind: plain, num_heads: 2}"
    settings = (attention, "zero.stage=2", "train.steps=2", "eval.every=2")
    launch(tiny, f"run_dir={run}", *settings, ranks=1, ATTNZOO_PLUGINS=str(NEWCOMERS / "plain.py"))
    with newcomer("plain"), caplog.at_level(logging.WARNING, "attnzoo.serve"):
        model = load_model(run / "export")
        engine = Engine(EngineConfig(checkpoint=str(run / "export")))
        prompts = [[5, 6, 7], [8]]
        answers = engine.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [answer.tokens for answer in answers] == [generate(model, [p], max_new_tokens=5)[0] for p in prompts]
    assert "plain streams by recomputation, which is slow" in caplog.text
    assert model.layers()[0].attention.module.calls.item() == 2 * 8 // 2


def test_a_minute_budget_becomes_a_number_of_steps(tiny: Path) -> None:
    run = tiny.parent / "minutes"
    options = ("train.steps=null", "train.max_minutes=0.05", "schedule.warmup_steps=20", "eval.every=20")
    launch(tiny, f"run_dir={run}", *options, "log.tensorboard=true", "sample.every=20", ranks=1)
    states = sorted(run.glob("checkpoints/step-*/state.json"))
    progress = json.loads(states[-1].read_text())["progress"]
    assert progress["total_steps"] == progress["step"] == max(losses(run)) > 20
    assert json.loads((run / "training.json").read_text())["rows"][0]["budget"] == progress["budget"]
    assert progress["budget"]["steps"] == progress["step"]
    other = launch(tiny, f"run_dir={run}", *options, "train.max_minutes=5", ranks=1, status=2)
    assert f"the steps of this run were fixed at {progress['step']} under train.max_minutes=0.05" in other.stderr
    assert list(run.glob("tensorboard/events.*"))
    assert (run / "samples.txt").read_text(encoding="utf-8").startswith("=== step 20 ===\n")


@pytest.mark.slow
def test_compile_runs(tiny: Path) -> None:
    run = tiny.parent / "compiled"
    launch(tiny, f"run_dir={run}", "train.compile=true", "train.steps=2", "zero.stage=0", ranks=1)
    plain = tiny.parent / "eager"
    launch(tiny, f"run_dir={plain}", "train.steps=2", "zero.stage=0", ranks=1)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
