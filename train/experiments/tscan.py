"""Experiment T: TSCAN predicts death in hospital on PhysioNet/CinC 2012, beside models of summary features, a GRU, and
its own branches alone (arXiv 2306.01970).

Every model learns from the same training rows of each fold; the inner validation rows select and calibrate; what is
judged are the test rows of all folds together. A fold of TSCAN is a run of train/main.py with
configs/tscan-mortality.yaml, in which the summary head learns apart: what it tells alone says what attention adds.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from attnzoo.clinical.baselines import Predictor, fit_lightgbm, fit_logistic_regression
from attnzoo.clinical.calibration import logit
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.gru import GruConfig, fit_gru
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.splits import Fold, folds
from attnzoo.clinical.summary import summary_features
from attnzoo.clinical.trained import TrainedModel, inputs, load_trained
from attnzoo.clinical.variables import STATICS
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Tick, Values
from train.experiments.runs import run_steps, trained_run
from train.experiments.tscan_figures import draw
from train.experiments.tscan_judge import ENSEMBLE, judge
from train.metrics import read_metrics

CONFIG = "tscan-mortality.yaml"
FOLDS, VALIDATION = 5, 0.125
QUICK = (
    "train.steps=4",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "schedule.warmup_steps=1",
    "eval.every=2",
    "eval.keep_best=1",
)
"""What a quick run changes of a training run."""
ARMS = {
    "both": "model.branches=both",
    "temporal": "model.branches=temporal",
    "spatial": "model.branches=spatial",
    "attention": "model.summary=none",
}
"""Forms of TSCAN, and what each changes of a run."""
TOLD = ("test", "validation")
"""Parts of a fold of which models tell logits."""
AGES = (0, 50, 65, 80)
"""Where age bands begin, in years."""


def fold_count(config: ExperimentConfig) -> int:
    """Number of folds."""
    return 2 if config.quick else FOLDS


def seeds(config: ExperimentConfig) -> tuple[int, ...]:
    """Seeds of the whole model: the run's own first, then those of the ensemble."""
    more = 0 if ENSEMBLE in config.without else 1 if config.quick else 2
    return tuple(range(config.seed, config.seed + 1 + more))


def read(config: ExperimentConfig) -> Cohort:
    """The cohort. Raises ValueError."""
    assert config.data is not None
    return load_cohort("physionet2012", config.data)


def split(cohort: Cohort, config: ExperimentConfig) -> list[Fold]:
    """The folds; those of the training runs."""
    return folds(cohort, fold_count(config), by="stay", label="mortality", validation=VALIDATION)


def stays(config: ExperimentConfig, tick: Tick) -> Values:
    """Outcomes, and the groups in which predictions are measured apart."""
    cohort = read(config)
    tick()
    return {
        "labels": cohort.label("mortality").astype(int).tolist(),
        "validation": [fold.validation.tolist() for fold in split(cohort, config)],
        "groups": {
            "sex": _codes(cohort, "sex"),
            "age": [_age_band(age) for age in cohort.statics_NS[:, cohort.statics.index("age")]],
            "ICU": _codes(cohort, "icu_type"),
        },
    }


def _codes(cohort: Cohort, static: str) -> list[str]:
    meanings = dict(STATICS[static].categories)
    found = cohort.statics_NS[:, cohort.statics.index(static)]
    return [meanings.get(int(code), str(code)) if np.isfinite(code) else "unknown" for code in found]


def _age_band(age: float) -> str:
    if not np.isfinite(age):
        return "unknown"
    at = np.searchsorted(AGES, age, side="right") - 1
    return f"{AGES[at]} or more" if at == len(AGES) - 1 else f"{AGES[at]} to {AGES[at + 1] - 1}"


def words(config: ExperimentConfig, fold: int, seed: int, arm: str) -> list[str]:
    """What a training run changes of its configuration."""
    return [
        f"data.path={config.data}",
        f"seed={seed}",
        ARMS[arm],
        f"task.folds={fold_count(config)}",
        f"task.fold={fold}",
        f"task.validation={VALIDATION}",
        "task.explained=0",  # nobody reads the run's explanations
        *(QUICK if config.quick else ("train.micro_batch_size=64",)),  # one rank, one pass a step
    ]


def attention(config: ExperimentConfig, tick: Tick, fold: int, seed: int, arm: str) -> Values:
    """One run of train/main.py. seconds: of the whole run, with reading the data, evaluations and the export. head:
    what the summary head of the whole model tells alone."""
    start = time.perf_counter()
    with trained_run(CONFIG, words(config, fold, seed, arm), tick) as run:
        seconds, model = time.perf_counter() - start, load_trained(run)
        memory = [
            record["peak_memory_mib"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"
        ]
    cohort = read(config)
    part = split(cohort, config)[fold]
    alone = {name: of_head(model, cohort, getattr(part, name)) for name in TOLD} if arm == "both" else {}
    return {
        **{name: model.logits(cohort, getattr(part, name))[:, 0].tolist() for name in TOLD},
        **({"head": {"rows": part.test.tolist(), **alone}} if alone else {}),
        "rows": part.test.tolist(),
        "seconds": seconds,
        "peak_mib": max(memory),
        "calibration": None if model.calibrator is None else model.calibrator.to_dict(),
    }


@torch.no_grad()
def of_head(model: TrainedModel, cohort: Cohort, rows: np.ndarray) -> list[float]:
    """Logits of the summary head alone, which is the last part."""
    assert model.model.config.combine == "mean"  # else it has learned to be added to the branches
    parts = model.model(*inputs(model.statistics, cohort, rows), each_part=True)
    found: list[float] = parts[-1, :, 0].tolist()
    return found


def baselines(config: ExperimentConfig, tick: Tick, fold: int) -> Values:
    """Logits of models that are no attention, by name, each with its seconds."""
    cohort = read(config)
    part, labels = split(cohort, config)[fold], cohort.label("mortality")
    features_NF = summary_features(cohort).values_NF
    tick()
    found: Values = {}
    both = np.concatenate([part.train, part.validation])
    fits: dict[str, tuple[Callable[..., Predictor], np.ndarray]] = {
        "logistic regression": (fit_logistic_regression, part.train),
        "LightGBM": (partial(fit_lightgbm, seed=config.seed), part.train),
        "LightGBM, inner rows too": (partial(fit_lightgbm, seed=config.seed), both),
    }
    for name, (fit, rows) in fits.items():
        start = time.perf_counter()
        predict = fit(features_NF[rows], labels[rows])
        told = {kind: logit(predict(features_NF[getattr(part, kind)])).tolist() for kind in TOLD}
        found[name] = {"rows": part.test.tolist(), **told, "seconds": time.perf_counter() - start}
        tick()
    start = time.perf_counter()
    gru = fit_gru(cohort, Outcome(), part, gru_config(config), seed=config.seed, tick=tick)
    told = {kind: gru.logits(cohort, getattr(part, kind))[:, 0].tolist() for kind in TOLD}
    found["GRU"] = {"rows": part.test.tolist(), **told, "seconds": time.perf_counter() - start}
    return found


def gru_config(config: ExperimentConfig) -> GruConfig:
    """As it is for all tasks; a quick run takes one epoch."""
    return GruConfig(epochs=1, keep_best=1) if config.quick else GruConfig()


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The stays; a run for each fold, seed and form of TSCAN; the baselines of each fold."""
    found = {"stays": ExperimentPart(stays, 1)}
    first, *others = seeds(config)
    kinds = [*((arm, first) for arm in ARMS), *(("both", seed) for seed in others)]
    steps = run_steps(CONFIG, words(config, 0, first, "both"))
    for arm, seed in kinds:
        for fold in range(fold_count(config)):
            run = partial(attention, fold=fold, seed=seed, arm=arm)
            found[f"{arm}, seed {seed}, fold {fold}"] = ExperimentPart(run, steps)
    for fold in range(fold_count(config)):
        found[f"baselines, fold {fold}"] = ExperimentPart(partial(baselines, fold=fold), 4 + gru_config(config).epochs)
    return found


EXPERIMENT = Experiment(
    "tscan",
    "T",
    "TSCAN: death in hospital",
    parts,
    judge,
    draw,
    data="set-a.tar.gz of PhysioNet/CinC 2012 with Outcomes-a.txt beside it (physionet.org/content/challenge-2012)",
    optional=(ENSEMBLE,),
)
