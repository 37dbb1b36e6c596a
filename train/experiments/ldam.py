"""Experiment N: LDAM tells which section of a note a dialogue belongs to, on MTS-Dialog, beside tf-idf with logistic
regression and beside itself without label definitions (arXiv 2201.06779).

Every model learns from the same training rows of each fold; the inner validation rows select; what is judged are the
test rows of all folds together. A fold of LDAM is a run of train/main.py with configs/ldam-sections.yaml. Its
predictions for test rows are explained, and the explanations measured.
"""

import math
import time
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from attnzoo.clinical.baselines import fit_text_regression
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.explain import CellMap
from attnzoo.clinical.explain_words import (
    LabelLogit,
    TextWords,
    word_attention,
    word_findings,
    word_gradients,
    word_rarity,
)
from attnzoo.clinical.faithfulness import random_removal, randomisation_check, removal
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.splits import Fold, folds
from attnzoo.clinical.trained_ldam import TrainedLdam, load_ldam
from attnzoo.models import Ldam
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Tick, Values
from train.experiments.ldam_judge import FORMS, REMOVED, SEEDS, SETTINGS, draw, judge
from train.experiments.runs import run_steps, trained_run

CONFIG = "ldam-sections.yaml"
FOLDS, VALIDATION = 5, 0.125
ONE_PASS = ("train.micro_batch_size=32", "task.explained=0")  # nobody reads the run's explanations
QUICK = ("train.steps=4", "schedule.warmup_steps=1", "eval.every=2", "eval.keep_best=1")
"""What a quick run changes of a training run."""
EXPLAINED, SHUFFLED = 100, 20
"""Test rows of each fold whose predictions are explained; those that the randomisation check takes."""
EXAMPLES = 2
"""Dialogues of the first fold whose most important words are shown."""


def read(config: ExperimentConfig) -> Cohort:
    """The dialogues. Raises ValueError."""
    assert config.data is not None
    return load_cohort("mts_dialog", config.data)


def split(cohort: Cohort) -> list[Fold]:
    """The folds; those of the training runs."""
    return folds(cohort, FOLDS, by="stay", label=tuple(cohort.labels), validation=VALIDATION)


def table(cohort: Cohort) -> np.ndarray:
    """Labels [N, K]."""
    return np.stack(list(cohort.labels.values()), axis=1)


def rows(config: ExperimentConfig, tick: Tick) -> Values:
    """Labels, and which rows each fold tests and validates."""
    cohort = read(config)
    made = split(cohort)
    tick()
    return {
        "names": list(cohort.labels),
        "labels": table(cohort).astype(int).tolist(),
        "test": [fold.test.tolist() for fold in made],
        "validation": [fold.validation.tolist() for fold in made],
        "words": [len(text.split()) for text in cohort.texts or ()],
    }


def regression(config: ExperimentConfig, tick: Tick) -> Values:
    """tf-idf and logistic regression: probabilities of validation and test rows of every fold, by setting."""
    cohort, found = read(config), {}
    texts, class_N = np.array(cohort.texts, dtype=object), table(cohort).argmax(1)
    number = len(cohort.labels)
    for ngrams, strength in SETTINGS[:1] if config.quick else SETTINGS:
        by_fold = []
        for fold in split(cohort)[: fold_count(config)]:
            predict = fit_text_regression(
                texts[fold.train].tolist(), class_N[fold.train], number, ngrams=ngrams, strength=strength
            )
            by_fold.append(_told(predict(texts[fold.validation].tolist()), predict(texts[fold.test].tolist())))
            tick()
        found[f"{ngrams} {strength:g}"] = by_fold
    return found


def fold_count(config: ExperimentConfig) -> int:
    """Number of folds that are trained."""
    return 2 if config.quick else FOLDS


def trained(config: ExperimentConfig, tick: Tick, form: str, seed: int, fold: int) -> Values:
    """A fold of LDAM: probabilities of validation and test rows; of the main form's first seed also explanations."""
    begun = time.perf_counter()
    cohort = read(config)
    own = split(cohort)[fold]
    with trained_run(CONFIG, words_of(config, form, seed, fold), tick) as run:
        model = load_ldam(run)
        seconds = time.perf_counter() - begun
        # Not calibrated: the inner validation rows choose a form, and the calibration is fitted to them.
        told = (model.uncalibrated(model.logits(cohort, rows)) for rows in (own.validation, own.test))
        found = _told(*told)
        found |= {"seconds": seconds, "parameters": sum(p.numel() for p in model.model.parameters())}
        if form == "LDAM" and seed == config.seed:
            found |= explained(config, model, cohort, own.test, examples=0 if fold else EXAMPLES)
    tick()
    return found


def words_of(config: ExperimentConfig, form: str, seed: int, fold: int) -> list[str]:
    """The overrides of a run."""
    quick = QUICK if config.quick else ()
    return [f"data.path={config.data}", f"task.fold={fold}", f"seed={seed}", *ONE_PASS, *FORMS[form], *quick]


def _told(validation_NK: np.ndarray, test_NK: np.ndarray) -> Values:
    return {"validation": np.round(validation_NK, 7).tolist(), "test": np.round(test_NK, 7).tolist()}


def explained(
    config: ExperimentConfig, model: TrainedLdam, cohort: Cohort, test: np.ndarray, *, examples: int
) -> Values:
    """What removal does by each map, and checks of the maps, on some test rows, spread evenly. What is explained is
    the label that the model finds likeliest."""
    wanted = 10 if config.quick else EXPLAINED
    chosen = test[np.arange(wanted) * len(test) // wanted]
    words_NL, lengths_N = model.inputs(cohort, chosen)
    label_N = model.logits(cohort, chosen).argmax(1)
    texts, logit = TextWords(words_NL, lengths_N, torch.from_numpy(label_N)), LabelLogit(model.model)
    gradients, attention = word_gradients(logit, texts), word_attention(model.model, texts)
    maps = (gradients, attention, word_rarity(model.model.get_buffer("rarity_W"), texts))
    measured = {one.name: removal(logit, texts, one) for one in maps}
    measured |= {"random": random_removal(logit, texts, seed=3), "chance": random_removal(logit, texts)}
    everything = torch.ones_like(texts.observed)
    difference_N = logit.without(texts) - logit.without(texts, everything)
    missing_N = (gradients.values_NTV.sum((1, 2)) - difference_N).abs() / difference_N.abs().clamp(min=1.0)
    few = texts.rows(slice(SHUFFLED))
    return {
        "removal": {name: {f: getattr(one, f).tolist() for f in REMOVED} for name, one in measured.items()},
        "missing": float(missing_N.max()),
        "shuffled": {
            # Few points are enough for an order, so that the sums may miss.
            "integrated gradients": randomisation_check(
                lambda m: word_gradients(LabelLogit(cast(Ldam, m)), few, tolerance=math.inf), model.model, few
            ),
            "attention": randomisation_check(lambda m: word_attention(cast(Ldam, m), few), model.model, few),
        },
        "examples": [_example(model, cohort, int(chosen[i]), i, int(label_N[i]), maps[:2]) for i in range(examples)],
    }


def _example(
    model: TrainedLdam, cohort: Cohort, row: int, place: int, label: int, maps: tuple[CellMap, ...]
) -> dict[str, Any]:
    """The words of a dialogue with the largest numbers."""
    assert cohort.texts is not None
    text = cohort.texts[row]
    told = {one.name: [w.word for w in word_findings(one, model, place, text, most=6)] for one in maps}
    return {"dialogue": cohort.stay_ids[row], "found": model.labels[label], **told}


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The dialogues, logistic regression, and a run for each form, seed and fold."""
    settings = 1 if config.quick else len(SETTINGS)
    found = {"rows": ExperimentPart(rows, 1), "tf-idf": ExperimentPart(regression, settings * fold_count(config))}
    for form in FORMS:
        seeds = SEEDS if form in ("LDAM", "no definitions") and not config.quick else SEEDS[:1]
        steps = run_steps(CONFIG, words_of(config, form, config.seed, 0)) + 1
        for seed in (config.seed + more for more in seeds):
            for fold in range(fold_count(config)):
                run = partial(trained, form=form, seed=seed, fold=fold)
                found[f"{form}, seed {seed}, fold {fold}"] = ExperimentPart(run, steps)
    return found


EXPERIMENT = Experiment(
    name="ldam",
    letter="N",
    title="LDAM on MTS-Dialog",
    parts=parts,
    judge=judge,
    draw=draw,
    data="the directory of MTS-Dialog (TrainingSet.csv and ValidationSet.csv)",
)
