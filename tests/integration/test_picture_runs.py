"""Models of pictures are trained by the same loop as other models: a whole run, split and resumed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnzoo.checkpoint import load_model
from attnzoo.vision.trained_pictures import load_pictures
from tests.helpers import serving
from tests.helpers.emoji_fonts import needs
from tests.helpers.picture_task import OWN, prepared, words
from tests.helpers.training import ROOT, launch, stay_records

SMALL = [
    *OWN,
    "train={steps: 6, batch_size: 8, micro_batch_size: 2, threads: 1}",
    "schedule={warmup_steps: 2}",
    "eval={every: 3, batch_size: 20, max_blocks: 40}",
    "log={every: 1, progress: false, tensorboard: false}",
    "checkpoint={every: null}",
    "task.patch_loss=0.5",
    "task.word_loss=0.1",
]


@needs("openmoji")
def test_a_model_of_pictures_resumes_bit_for_bit_on_two_ranks(tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    given, config = words(tmp_path / "cache", *SMALL), ROOT / "configs" / "vlm-small.yaml"
    for run, *overrides in ((whole,), (split, "train.stop_at_step=4"), (split,)):
        launch(config, f"run_dir={run}", *given, *overrides, ranks=2)
    one, other = (stay_records(run) for run in (whole, split))
    for records in (one, other):
        for record in records.values():
            record.pop("images_per_second", None)
    assert one == other
    for name in ("model.safetensors", "pictures.safetensors"):
        weights, again = (load_file(run / "export" / name) for run in (whole, split))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert one["train", 6]["loss"] < one["train", 1]["loss"]

    trained = load_pictures(split)
    task = prepared(tmp_path / "cache", *OWN)
    with torch.no_grad():
        measured = task.measure(trained.model, task.validation())
    found = task.metrics(task.validation(), measured)
    final = one["eval", 6]
    assert found["loss"] == pytest.approx(final["loss"], rel=1e-5)
    assert {name: found[name] for name in ("accuracy", "side", "blind")} == pytest.approx(
        {name: final[name] for name in ("accuracy", "side", "blind")}, abs=0.02
    )


@needs("openmoji")
def test_adapters_of_a_language_model_are_trained_and_merged(tmp_path: Path) -> None:
    """The tower and the projector train too; what is exported needs no other language model and no peft."""
    lm, run = serving.export(tmp_path / "lm", "mha", max_len=256), tmp_path / "run"
    adapted = [f"model.language_model={lm}", "model.projector={hidden: 20, grid: 2}", "model.dtype=float32"]
    more = ["lora={rank: 3, targets: [query, output]}", "optim.lr=1e-2", "task.word_loss=0.1"]
    small = [word for word in SMALL if not word.startswith(("model.decoder", "tokenizer"))]
    given = words(tmp_path / "cache", *small, *adapted, *more)
    launch(ROOT / "configs" / "vlm-smollm2.yaml", f"run_dir={run}", *given, ranks=2)
    trained = load_pictures(run)
    before, after = load_model(lm).state_dict(), trained.language_model.model.state_dict()
    assert trained.own
    assert before.keys() == after.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in after if name.endswith(("query.weight", "output.weight"))}
    records = stay_records(run)
    assert records["train", 6]["loss"] < records["train", 1]["loss"]
    task = prepared(tmp_path / "cache", *given, config="vlm-smollm2.yaml")
    with torch.no_grad():
        measured = task.measure(trained.model, task.validation())
    assert task.metrics(task.validation(), measured)["loss"] == pytest.approx(records["eval", 6]["loss"], rel=1e-4)
