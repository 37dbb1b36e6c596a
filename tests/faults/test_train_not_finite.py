"""Losses and gradients that are not finite: skipped and named at every ZeRO stage, never saved, never exported."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.training import launch, losses, write_tiny

PLUGIN = '''\
"""MHA whose output is NaN in steps of the environment variable BREAKS (rank:first:last), two passes a step."""

import os

import torch

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.mha import MHA


@ATTENTION.register("breaks")
class Breaks(MHA):
    calls = 0

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        if not (self.training and torch.is_grad_enabled()):
            return out
        self.calls += 1
        rank, first, last = map(int, os.environ["BREAKS"].split(":"))
        now = (self.calls + 1) // 2
        return out * float("nan") if first <= now <= last and os.environ["RANK"] == str(rank) else out
'''
LOSS = '''\
"""A loss that is NaN in a step, and whose gradients are finite: what is added has none."""

import os

import torch

from attnzoo.attention.base import ATTENTION
from attnzoo.attention.mha import MHA
from attnzoo.models import DecoderLM

ATTENTION.register("plain")(type("Plain", (MHA,), {"__doc__": "What every plug-in has: a variant."}))
loss, calls = DecoderLM.loss, 0


def broken(self, *args, **options):
    global calls
    value = loss(self, *args, **options)
    if not torch.is_grad_enabled():
        return value
    calls += 1
    rank, step = map(int, os.environ["BREAKS"].split(":"))
    return value + float("nan") if calls == step and os.environ["RANK"] == str(rank) else value


DecoderLM.loss = broken
'''
MODEL = ("model.attention={kind: breaks, num_heads: 2}", "optim.name=adamw")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = write_tiny(tmp_path_factory.mktemp("finite"))
    (config.parent / "breaks.py").write_text(PLUGIN, encoding="utf-8")
    return config


def plugin(tiny: Path, steps: str) -> dict[str, str]:
    return {"ATTNZOO_PLUGINS": str(tiny.parent / "breaks.py"), "BREAKS": steps}


def files(run: Path) -> dict[str, bytes]:
    """Every file of the checkpoints and the export."""
    places = [*(run / "checkpoints").rglob("*"), *(run / "export").rglob("*")]
    return {str(p.relative_to(run)): p.read_bytes() for p in places if p.is_file()}


STAGES = [
    pytest.param(0, "fp32"),
    pytest.param(0, "bf16"),
    pytest.param(2, "bf16"),
    pytest.param(3, "fp32"),
    pytest.param(1, "fp32", marks=pytest.mark.slow),
    pytest.param(1, "bf16_autocast", marks=pytest.mark.slow),
    pytest.param(2, "fp32", marks=pytest.mark.slow),
    pytest.param(3, "bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_a_broken_step_is_skipped_and_named(tiny: Path, tmp_path: Path, stage: int, precision: str) -> None:
    """One bad step of rank 1; then, going on from there, bad steps to the end: nothing of what is whole is lost."""
    run = tmp_path / "run"
    options = (f"run_dir={run}", *MODEL, f"zero.stage={stage}", f"precision={precision}", "checkpoint.every=2")
    first = launch(tiny, *options, **plugin(tiny, "1:2:2"))
    told = [line for line in first.stderr.splitlines() if line.startswith("train: skipped step 2:")]
    assert len(told) == 1, first.stderr
    assert "the loss of rank 1 is nan; the gradient of norm.weight and" in told[0]
    assert " more on rank 1 is not finite" in told[0]
    assert "rank 0" not in told[0]
    records = losses(run)
    assert records[2] is None
    assert all(math.isfinite(records[step]) for step in (1, 3, 4, 5, 6))
    assert losses(run, field="skipped_steps") == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    # Step 2 was due and not saved: the next good one was, instead.
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000006"]
    assert all(bool(torch.isfinite(w).all()) for w in load_file(run / "export" / "model.safetensors").values())

    before = files(run)
    second = launch(tiny, *options, "train.steps=20", "train.non_finite_steps=3", status=1, **plugin(tiny, "0:1:100"))
    assert "train: 3 steps in a row without an update (train.non_finite_steps), the last one: step 9" in second.stderr
    assert "the newest checkpoint is step-00000006" in second.stderr
    assert "Traceback" not in second.stderr
    assert files(run) == before
    assert losses(run, field="skipped_steps")[9] == 4


def test_a_loss_that_is_nan_with_finite_gradients_is_skipped_by_all_ranks(tiny: Path, tmp_path: Path) -> None:
    """Nothing but the loss of rank 1 tells: the ranks hear of it, none of them takes the step, the rest goes on."""
    (tmp_path / "loss.py").write_text(LOSS, encoding="utf-8")
    options = ("train.steps=3", "train.micro_batch_size=4", "optim.name=adamw", "zero.stage=1")
    run, variables = tmp_path / "run", {"ATTNZOO_PLUGINS": str(tmp_path / "loss.py"), "BREAKS": "1:2"}
    told = [
        t for t in launch(tiny, *options, f"run_dir={run}", **variables).stderr.splitlines() if t.startswith("train:")
    ]
    assert told == ["train: skipped step 2: the loss of rank 1 is nan"]
    assert losses(run, field="skipped_steps") == {1: 0, 2: 1, 3: 1}
    assert [loss is None for loss in losses(run).values()] == [False, True, False]
    assert losses(run, field="gradient_norm")[2] is None


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, "fp32"),
        pytest.param(0, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_going_back_passes_the_broken_data(tiny: Path, tmp_path: Path, stage: int, precision: str) -> None:
    run = tmp_path / "run"
    options = (f"run_dir={run}", *MODEL, "checkpoint.every=2", "train.steps=8", "train.non_finite_steps=2")
    more = (f"zero.stage={stage}", f"precision={precision}", "train.non_finite=go_back", "train.micro_batch_size=4")
    found = launch(tiny, *options, *more, **plugin(tiny, "0:4:5"), ranks=1)
    assert "going back to step-00000002, past the data since then" in found.stderr
    records = losses(run)
    assert list(records) == list(range(1, 9))
    assert all(math.isfinite(loss) for loss in records.values())
    row = json.loads((run / "training.json").read_text())["rows"][0]
    assert row["complete"]
    assert row["steps"] == 8


def test_a_rate_that_destroys_the_weights_ends_the_run(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = (f"run_dir={run}", "optim.name=adamw", "zero.stage=0", "schedule.kind=constant", "train.steps=30")
    found = launch(tiny, *options, "schedule.warmup_steps=0", "optim.lr=1e30", status=1, ranks=1)
    assert "5 steps in a row without an update" in found.stderr
    assert "there is no checkpoint yet" in found.stderr
    assert not (run / "export").exists()
    assert not list((run / "checkpoints").glob("step-*"))


def test_weights_that_are_not_finite_are_no_start(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    launch(tiny, f"run_dir={source}", "train.steps=1", ranks=1)
    weights = load_file(source / "export" / "model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[5] = math.nan
    save_file(weights, source / "export" / "model.safetensors")
    found = launch(tiny, f"run_dir={tmp_path / 'run'}", f"checkpoint.init_from={source / 'export'}", ranks=1, status=2)
    assert name in found.stderr
    assert "finite" in found.stderr
    assert "Traceback" not in found.stderr
