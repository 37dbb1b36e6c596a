"""Experiment L: TSCAN tells the remaining length of stay anew every hour, beside a GRU (arXiv 2306.01970).

Both learn from the same training rows of each fold and are selected on the same inner validation rows; the stays of all
test parts are judged together. A fold of TSCAN is a run of train/main.py with configs/tscan-los.yaml.
"""

from functools import lru_cache, partial

import numpy as np

from attnzoo.clinical.gru import GruConfig, fit_gru
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.trained import load_trained
from train.config_reader import load_config
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Tick, Values
from train.experiments.los_figure import draw
from train.experiments.los_judge import ATTENTION, GRU, HOUR, judge
from train.experiments.runs import run_steps, trained_run
from train.tasks import ClinicalTask, build_task

CONFIG = "tscan-los.yaml"
FOLDS = 5
QUICK = ("train.steps=4", "schedule.warmup_steps=1", "eval.every=2", "eval.keep_best=1", "model.model_dim=8")
LEAST_STAYS = 20
"""So many training stays of an hour tell the median of the hour."""
GRU_CONFIG = GruConfig(epochs=12, hidden=64)


def words(config: ExperimentConfig, fold: int) -> tuple[str, ...]:
    """What a training run changes of its configuration."""
    folds = 2 if config.quick else FOLDS
    given = (f"data.path={config.data}", f"seed={config.seed}", f"task.folds={folds}", f"task.fold={fold}")
    return given + (QUICK if config.quick else ())


@lru_cache(maxsize=1)  # a cohort is some 100 MB
def task_of(given: tuple[str, ...]) -> ClinicalTask:
    """The task of a run, for its cohort and its fold."""
    task = build_task(load_config(CONFIG, list(given)))
    assert isinstance(task, ClinicalTask)
    return task


def told(task: ClinicalTask, outcome: Outcome, buckets_NT: np.ndarray) -> Values:
    """What was predicted of every labelled hour of the test stays: stay (row of the cohort), hour, true remaining
    hours, bucket, and its typical remaining hours."""
    rows = task.fold.test
    labels_NT = outcome.labels(task.cohort, rows)
    stay_K, hour_K = np.nonzero(~np.isnan(labels_NT))
    bucket_K = buckets_NT[stay_K, hour_K]
    return {
        "stays": rows[stay_K].tolist(),
        "hours": hour_K.tolist(),
        "remaining": labels_NT[stay_K, hour_K].tolist(),
        "buckets": bucket_K.tolist(),
        "typical": np.array(outcome.centers)[bucket_K].tolist(),
        "edges": list(outcome.edges),
    }


def attention(config: ExperimentConfig, tick: Tick, fold: int) -> Values:
    """A run of train/main.py; inner: its export's kappa on the inner validation rows."""
    given = words(config, fold)
    with trained_run(CONFIG, given, tick) as run:
        model = load_trained(run)
    task = task_of(given)
    found = told(task, model.outcome, model.outcome.buckets(model.logits(task.cohort, task.fold.test)))
    return {**found, "inner": model.metadata["kappa"], "weights": sum(w.numel() for w in model.model.parameters())}


def recurrent(config: ExperimentConfig, tick: Tick, fold: int) -> Values:
    """The GRU; inner: the best epoch's kappa on the inner validation rows."""
    task, chosen = task_of(words(config, fold)), GRU_CONFIG if not config.quick else GruConfig(epochs=1, hidden=8)
    model = fit_gru(task.cohort, task.outcome, task.fold, chosen, seed=config.seed, tick=tick)
    found = told(task, model.outcome, model.outcome.buckets(model.logits(task.cohort, task.fold.test)))
    return {**found, "inner": max(model.scores), "weights": sum(w.numel() for w in model.network.parameters())}


def hour_alone(config: ExperimentConfig, tick: Tick, fold: int) -> Values:
    """The median of the training stays that were still there at that hour: what a clock knows."""
    task = task_of(words(config, fold))
    labels_NT = task.outcome.labels(task.cohort, task.fold.train)
    outcome, hours = task.outcome.fitted(labels_NT), labels_NT.shape[1]
    here_T = (~np.isnan(labels_NT)).sum(axis=0)
    last = int(np.flatnonzero(here_T >= min(LEAST_STAYS, here_T.max()))[-1])
    median_T = np.array([np.nanmedian(labels_NT[:, min(hour, last)]) for hour in range(hours)])
    bucket_T = np.searchsorted(outcome.edges, median_T, side="right")
    tick()
    return told(task, outcome, np.broadcast_to(bucket_T, (len(task.fold.test), hours)))


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The three models of every fold."""
    found = {}
    epochs = 1 if config.quick else GRU_CONFIG.epochs
    for fold in range(2 if config.quick else FOLDS):
        steps = run_steps(CONFIG, words(config, fold))
        found[f"{ATTENTION}, fold {fold}"] = ExperimentPart(partial(attention, fold=fold), steps)
        found[f"{GRU}, fold {fold}"] = ExperimentPart(partial(recurrent, fold=fold), epochs)
        found[f"{HOUR}, fold {fold}"] = ExperimentPart(partial(hour_alone, fold=fold), 1)
    return found


EXPERIMENT = Experiment(
    "tscan-los",
    "L",
    "TSCAN: remaining length of stay",
    parts,
    judge,
    draw,
    data="los/eicu_demo of YAIB's demo data: dyn.parquet, sta.parquet, outc.parquet (github.com/rvandewater/YAIB)",
)
