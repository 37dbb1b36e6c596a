"""The directory of a small clinical run, as training writes it."""

from pathlib import Path

import numpy as np

from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.statistics import Statistics, missing
from attnzoo.clinical.trained import TrainedModel, save_trained
from attnzoo.models import EhrConfig, EhrEncoder
from attnzoo.report import Report
from tests.helpers.clinical_data import small_cohort


def written_run(root: Path) -> Path:
    """The files of a run, as training writes them, below a directory."""
    cohort, train = small_cohort(), np.arange(30)
    statistics, outcome = Statistics.fit(cohort, train), Outcome()
    config = EhrConfig(variables=3, statics=len(statistics.static_columns), model_dim=8, num_heads=2, mlp_dim=16)
    data, split = {"format": "physionet2012", "cohort": "made up", "hours": 6}, {"split": "stay", "digest": "abc"}
    model = TrainedModel(EhrEncoder(config), statistics, outcome, data, split, {"steps": 7, "auroc": 0.625})
    save_trained(root / "run" / "export", model)
    report = Report.start(command=["train/main.py", "--config", "x.yaml"], seed=3)
    told = {"values": {"HR": {"used": 90, "clipped": 2}}, "left_out": {"stays without outcome": 4, "none": 0}}
    told["parts"] = {"training": {"stays": 30, **outcome.counts(cohort.label("mortality")[train])}}
    told["missing"] = missing(cohort.grid, train)
    report.rows.append({"name": "tiny", "steps": 7, "complete": True, "parameters": 123, "data": told})
    report.rows[0]["selected_steps"] = [4]
    report.write(root / "run" / "training.json")
    settings = "task: {kind: clinical}\ndata: {path: set-a}\nmodel: {model_dim: 8}\neval: {keep_best: 2}\n"
    (root / "run" / "config.yaml").write_text(settings)
    (root / "run" / "metrics.jsonl").write_text('{"kind": "eval", "step": 4, "auroc": 0.6}\n{"kind": "ev')
    return root / "run"
