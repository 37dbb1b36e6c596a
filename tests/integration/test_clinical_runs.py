"""A clinical model is trained by the same loop as language models: whole runs on two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnzoo.cli import main
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.held_out import held_out
from attnzoo.clinical.metrics import auroc
from attnzoo.clinical.splits import folds
from attnzoo.clinical.trained import load_trained
from tests.helpers.clinical_files import write_stays
from tests.helpers.training import ROOT, launch, stay_records
from train.experiments import tscan
from train.experiments.base import ExperimentConfig

STAYS, HOURS = 64, 12
CONFIG = """\
base: {base}
name: tiny
run_dir: {run}
cache_dir: {cache}
task: {{folds: 4, validation: 0.25}}
data: {{path: {data}, hours: 12, variables: [HR, Temp, Lactate]}}
model: {{model_dim: 8, num_heads: 2, mlp_dim: 16, chunks: 2, chunk_hours: 6}}
optim: {{lr: 0.01}}
schedule: {{warmup_steps: 2}}
train: {{steps: 6, batch_size: 8, micro_batch_size: 2, threads: 1}}
eval: {{every: 2, batch_size: 5, keep_best: 2}}
log: {{every: 1, progress: false, tensorboard: false}}
checkpoint: {{every: null}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stays of which those with a fast heart die more often, and a configuration."""
    directory = tmp_path_factory.mktemp("clinical")
    data = write_stays(directory, STAYS, HOURS)
    names = {"base": ROOT / "configs" / "tscan-mortality.yaml", "run": directory / "run", "cache": directory / "cache"}
    (directory / "tiny.yaml").write_text(CONFIG.format(**names, data=data), encoding="utf-8")
    return directory / "tiny.yaml"


def test_a_clinical_run_resumes_bit_for_bit_and_its_export_predicts(tiny: Path) -> None:
    """Interrupted where an evaluation is, with weights that were selected before and after it."""
    whole, split = tiny.parent / "whole", tiny.parent / "split"
    launch(tiny, f"run_dir={whole}")
    launch(tiny, f"run_dir={split}", "train.stop_at_step=4")
    launch(tiny, f"run_dir={split}")
    one, other = (stay_records(run) for run in (whole, split))
    assert one == other
    kinds = [kind for kind, _ in one]
    assert (kinds.count("train"), kinds.count("eval"), kinds.count("selected")) == (6, 4, 1)
    weights, again = (load_file(run / "export" / "model.safetensors") for run in (whole, split))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    selected = [load_file(path) for path in whole.glob("checkpoints/step-00000006/selected-*.safetensors")]
    assert len(selected) == 2
    for name, weight in weights.items():  # the export is the mean of what was selected
        torch.testing.assert_close(weight, (selected[0][name] + selected[1][name]) / 2, rtol=0, atol=1e-6)
    assert any(not torch.equal(selected[0][name], selected[1][name]) for name in weights)
    assert (whole / "export" / "config.json").read_text() == (split / "export" / "config.json").read_text()

    model = load_trained(whole)
    cohort = load_cohort("physionet2012", tiny.parent / "set-a", hours=HOURS, variables=("HR", "Temp", "Lactate"))
    assert model.split["fold"] == 0
    assert model.evidence is not None
    known = cohort.label("mortality")[folds(cohort, 4, by="stay", label="mortality", seed=0, validation=0.25)[0].train]
    assert (model.evidence.stays, model.evidence.shares) == (len(known), (float(known.mean(dtype=np.float64)),))
    assert model.evidence.uncalibrated is not None
    assert model.evidence.uncalibrated.startswith("the part that calibrates has ")  # of its few stays
    assert model.calibrator is None
    assert set(model.evidence.maps) == {"integrated gradients", "attention"}
    # The metrics of the export are those of what it predicts on the validation part, told anew by the same split.
    fold = folds(cohort, 4, by="stay", label="mortality", seed=0, validation=0.25)[0]
    assert held_out(model, cohort).tolist() == fold.test.tolist()
    found = auroc(cohort.label("mortality")[fold.validation], model.predict(cohort, fold.validation))
    assert found == pytest.approx(one["selected", 6]["auroc"], abs=1e-9)
    row = json.loads((whole / "training.json").read_text())["rows"][0]
    assert row["auroc"] == one["selected", 6]["auroc"]
    steps = [int(path.stem.split("-")[1]) for path in whole.glob("checkpoints/step-00000006/selected-*.safetensors")]
    assert row["selected_steps"] == sorted(steps)
    why, *verdicts = row["findings"]
    assert why == f"warning: the model is not calibrated, and served without an interval: {model.evidence.uncalibrated}"
    assert verdicts == [one.words for one in model.evidence.maps.values()]
    assert row["training_stays"] + row["validation_stays"] == STAYS - len(fold.test)
    assert main(["card", str(whole)]) == 0
    died = int(cohort.label("mortality")[fold.test].sum())
    assert f"| test | {len(fold.test)} | {len(fold.test)} | {died} |" in (whole / "card" / "data-card.md").read_text()


def test_a_run_begins_with_what_pretraining_exported(tiny: Path) -> None:
    """Pretraining resumes bit for bit, too, and the first step of the run after it has its encoder."""
    pretraining = ("task.kind=clinical-pretraining", "eval.keep_best=null", "train.steps=4")
    whole, split = (tiny.parent / f"pretrained-{name}" for name in ("whole", "split"))
    launch(tiny, f"run_dir={whole}", *pretraining)
    launch(tiny, f"run_dir={split}", *pretraining, "train.stop_at_step=2")
    launch(tiny, f"run_dir={split}", *pretraining)
    one, other = (stay_records(run) for run in (whole, split))
    assert one == other
    assert len({record["loss"] for (kind, _), record in one.items() if kind == "train"}) == 4
    encoders = [load_file(run / "export" / "model.safetensors") for run in (whole, split)]
    assert all(torch.equal(encoders[1][name], weight) for name, weight in encoders[0].items())
    begun = tiny.parent / "begun"
    still = ("optim.lr=1e-30", "optim.weight_decay=0.0", "schedule.warmup_steps=0", "train.steps=1", "eval.every=1")
    launch(tiny, f"run_dir={begun}", f"checkpoint.init_from={whole}", *still, "eval.keep_best=1")
    for name, weight in load_file(begun / "export" / "model.safetensors").items():
        torch.testing.assert_close(weight, encoders[0][name], rtol=0, atol=1e-20)


def test_a_fold_of_the_reproduction_of_tscan(tiny: Path) -> None:
    """On the made-up stays, which are too few to calibrate on: a real run; every test row is told once."""
    config = ExperimentConfig(quick=True, data=tiny.parent / "set-a")
    parts = tscan.parts(config)
    values = {
        name: parts[name].run(config, lambda: None) for name in ("stays", "both, seed 0, fold 1", "baselines, fold 1")
    }
    json.dumps(values)
    cohort, run = tscan.read(config), values["both, seed 0, fold 1"]
    part = tscan.split(cohort, config)[1]
    assert run["calibration"] is None
    assert values["stays"]["validation"][1] == part.validation.tolist()
    assert run["head"]["test"] != run["test"]
    for told in (run, run["head"], *values["baselines, fold 1"].values()):
        assert told["rows"] == part.test.tolist()
        assert len(told["test"]) == len(part.test)
        assert len(told["validation"]) == len(part.validation)
