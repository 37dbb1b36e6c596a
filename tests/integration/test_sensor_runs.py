"""An adapter is trained in front of a frozen language model by the same loop as other models: whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.metrics import auroc
from attnzoo.clinical.splits import time_split
from attnzoo.clinical.trained_sensors import load_sensors
from tests.helpers import serving
from tests.helpers.training import ROOT, launch, stay_records

SENSORS = """\
base: {base}
name: sensors
cache_dir: {cache}
task: {{questions: {{fatigue: "Tired?", stress: "Stressed?"}}, template: "{{question}}{{sensors}}!", validation: 0.3}}
data: {{path: {data}, days: 3, variables: [sedentary_minutes, sleep_minutes]}}
model: {{language_model: {lm}, dtype: float32, tokens: 2, hidden: 5, layers: 2}}
schedule: {{warmup_steps: 2}}
train: {{steps: 6, batch_size: 8, micro_batch_size: 4, threads: 1}}
eval: {{every: 2, batch_size: 5, keep_best: 2}}
log: {{every: 1, progress: false, tensorboard: false}}
checkpoint: {{every: null}}
"""


def write_wearables(root: Path, days: int = 30) -> Path:
    """Four people who are tired after bad nights."""
    random = np.random.default_rng(1)
    for person in range(1, 5):
        dates = [str(np.datetime64("2020-01-01") + day) for day in range(days)]
        slept = random.integers(300, 480, days)
        sedentary = [{"dateTime": f"{date} 00:00:00", "value": str(random.integers(500, 900))} for date in dates]
        nights = [
            {"dateOfSleep": date, "startTime": f"{date}T00:30:00", "minutesAsleep": int(minutes), "minutesAwake": 30,
             "timeInBed": 500, "efficiency": 93, "levels": {}}
            for date, minutes in zip(dates, slept, strict=True)
        ]  # fmt: skip
        lines = ["effective_time_frame,fatigue,mood,readiness,sleep_quality,soreness,stress"]
        for day, date in enumerate(dates[1:]):
            lines.append(
                f"{date}T08:00:00.000Z,{1 if slept[day] < 380 else 4},3,{day % 11},3,3,{random.integers(1, 6)}"
            )
        for name, text in (
            ("fitbit/sedentary_minutes.json", json.dumps(sedentary)),
            ("fitbit/sleep.json", json.dumps(nights)),
            ("pmsys/wellness.csv", "\n".join([*lines, ""])),
        ):
            path = root / "pmdata" / f"p{person:02d}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root / "pmdata"


def test_an_adapter_resumes_bit_for_bit_and_its_export_predicts(tmp_path: Path) -> None:
    """The language model stands in no checkpoint and in no export, and is as it was."""
    lm, data = serving.export(tmp_path / "lm", "rcmha"), write_wearables(tmp_path)
    before = {path.name: path.read_bytes() for path in lm.iterdir()}
    names = {"base": ROOT / "configs" / "phllm-pro.yaml", "cache": tmp_path / "cache", "data": data, "lm": lm}
    (tmp_path / "sensors.yaml").write_text(SENSORS.format(**names), encoding="utf-8")
    whole, split = tmp_path / "whole", tmp_path / "split"
    for run, *overrides in ((whole,), (split, "train.stop_at_step=4"), (split,)):
        launch(tmp_path / "sensors.yaml", f"run_dir={run}", *overrides, ranks=1)
    one, other = (stay_records(run) for run in (whole, split))
    assert one == other
    weights, again = (load_file(run / "export" / "model.safetensors") for run in (whole, split))
    assert weights.keys() == {
        f"{name}.{kind}" for name in ("hidden.0", "hidden.3", "output") for kind in ("weight", "bias")
    }
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) < 400_000
    assert {path.name: path.read_bytes() for path in lm.iterdir()} == before

    model = load_sensors(split)
    cohort = load_cohort("pmdata", data, days=3, variables=("sedentary_minutes", "sleep_minutes"))
    fold = time_split(cohort, validation=0.3)
    scores_NQ = model.scores(model.statistics.standardised(cohort, fold.validation))  # probabilities saturate
    found = [auroc(cohort.label(q)[fold.validation], scores_NQ[:, i]) for i, q in enumerate(("fatigue", "stress"))]
    assert np.mean(found) == pytest.approx(one["selected", 6]["auroc"], abs=1e-9)
