"""LDAM on the texts and series of an eICU data set, from files to predictions: whole runs on two ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.metrics import macro_auroc
from attnzoo.clinical.splits import folds
from attnzoo.clinical.trained_ldam import load_ldam
from tests.helpers.clinical_texts import write_eicu_texts
from tests.helpers.training import ROOT, launch, stay_records

CONFIG = """\
base: {base}
name: tiny
run_dir: {run}
cache_dir: {cache}
task: {{split: patient, folds: 4, validation: 0.25, least: 1, labels: [mortality]}}
data: {{format: eicu, path: {data}, hours: 24, texts: true, variables: [hr, na]}}
model: {{model_dim: 8, num_layers: 1, num_heads: 2, mlp_dim: 8, exclusive: false}}
schedule: {{warmup_steps: 2}}
train: {{steps: 12, batch_size: 8, micro_batch_size: 2}}
eval: {{every: 6, batch_size: 5, keep_best: 2}}
log: {{every: 1, progress: false, tensorboard: false}}
"""


@pytest.mark.heavy
def test_a_run_resumes_bit_for_bit_and_predicts_the_same_from_records_that_end_at_the_cut(tmp_path: Path) -> None:
    config, whole, split = tmp_path / "tiny.yaml", tmp_path / "whole", tmp_path / "split"
    data = write_eicu_texts(tmp_path / "eicu")
    names = {"base": ROOT / "configs" / "ldam-sections.yaml", "run": tmp_path / "run", "cache": tmp_path / "cache"}
    config.write_text(CONFIG.format(**names, data=data), encoding="utf-8")
    launch(config, f"run_dir={whole}")
    launch(config, f"run_dir={split}", "train.stop_at_step=6")
    launch(config, f"run_dir={split}")
    one = stay_records(whole)
    assert one == stay_records(split)
    weights, again = (load_file(run / "export" / "model.safetensors") for run in (whole, split))
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    model = load_ldam(whole)
    options = {"hours": 24, "texts": True, "variables": ("hr", "na")}
    cohort = load_cohort("eicu", data, **options)
    fold = folds(cohort, 4, by="patient", label=("mortality",), validation=0.25)[0]
    found_NK = model.predict(cohort)
    labels_NK = cohort.label("mortality")[:, None]
    told = macro_auroc(1)(labels_NK[fold.validation], found_NK[fold.validation])
    assert told == pytest.approx(one["selected", 12]["macro_auroc"], abs=1e-9)
    assert not {"morgue", "home"} & set(model.vocabulary.words), "these are written after the cut"
    # Built from records that end at the prediction's time, inputs and predictions are the same.
    cut = load_cohort("eicu", write_eicu_texts(tmp_path / "cut", hours=24, later=False), **options)
    assert all(torch.equal(*pair) for pair in zip(model.inputs(cohort), model.inputs(cut), strict=True))
    assert np.array_equal(model.predict(cut), found_NK)
