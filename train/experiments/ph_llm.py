"""Experiment H: PH-LLM's sensor adapter (arXiv 2406.06474) on PMData, beside logistic regression, each person's mean
and the language model that reads the numbers as text; its published predictions and ratings, recomputed.

An adapter is a run of train/main.py with configs/phllm-pro.yaml. It learns from the first part of each person's days;
later ones select, and the last 30 % are judged. SmolLM2 is the language model once. All that takes several trainings
(seeds, fewer days, half of the rows, people who were never seen) has a small decoder in its place, which is trained in
the same run on Python's standard library. Other ablations give a trained adapter other numbers, or the language model
other tokens.
"""

import csv
from pathlib import Path

import numpy as np
import torch

from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.clinical.baselines import fit_logistic_regression
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.metrics import macro_auroc
from attnzoo.clinical.ratings import all_pairs, pooled, read_ratings
from attnzoo.clinical.sensors import SensorQuestions, sensor_numbers
from attnzoo.clinical.splits import Fold, folds, time_split
from attnzoo.clinical.trained_sensors import TrainedSensors, load_sensors
from attnzoo.clinical.variables import PMDATA
from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Tick, Values
from train.experiments.ph_llm_judge import draw, judge
from train.experiments.runs import run_steps, trained_run

CONFIG, ARCHIVE = "phllm-pro.yaml", "pmdata.tar.gz"
DAYS, WINDOWS, VALIDATION, PEOPLE_FOLDS, PEOPLE_VALIDATION = 15, (10, 5), 0.125, 4, 0.25
PREDICTIONS, RATINGS = "pro_preds_bootstrap.tsv", "{}_human_expert_ratings.tsv.gz"
NOISE = (0.1, 1.0)
"""Standard deviations of noise that is added to standardised numbers."""
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Inverse penalties of logistic regression; the validation rows choose."""
SEEDS = 3
TEXT_EVERY = 4
"""Every so many test days are also read as text."""
QUICK_EVERY = 4
"""Every so many test days are judged in a quick run."""
SMALL_CONFIG, SMALL_STEPS = "try.yaml", 60
"""The small decoder's training."""
SMALL_PROMPT = ("task.template='{question}{sensors} =='", "task.answers=[' False', ' True']")
"""It has read nothing but Python."""
QUICK = ("train.steps=2", "schedule.warmup_steps=1", "eval.every=2", "eval.keep_best=1", "train.batch_size=16")


def found(config: ExperimentConfig, name: str) -> Path | None:
    """A file of that name in the data folder, at any depth; the folder may be the archive itself."""
    assert config.data is not None
    if config.data.is_file():
        return config.data if name == ARCHIVE else None
    return next(iter(sorted(config.data.rglob(name))), None)


def archive(config: ExperimentConfig) -> Path:
    """PMData. Raises ValueError where it is missing."""
    path = found(config, ARCHIVE)
    if path is None:
        raise ValueError(f"--data={config.data} holds no {ARCHIVE}; get it from datasets.simula.no/pmdata")
    return path


def split(cohort: Cohort) -> Fold:
    """In time; as the training runs do."""
    return time_split(cohort, validation=VALIDATION)


def people_folds(cohort: Cohort) -> list[Fold]:
    """By person; as the training runs do."""
    return folds(cohort, PEOPLE_FOLDS, validation=PEOPLE_VALIDATION)


# --- trained adapters ---------------------------------------------------------------------------------------------


def small_runs(config: ExperimentConfig) -> dict[str, tuple[str, ...]]:
    """What differs from the configuration, for each run with the small decoder."""
    runs: dict[str, tuple[str, ...]] = {f"seed {seed}": (f"seed={config.seed + seed}",) for seed in range(SEEDS)}
    runs |= {f"{days} days": (f"data.days={days}",) for days in WINDOWS}
    runs["half of the rows"] = ("task.share=0.5",)
    by_person = ("task.split=patient", f"task.folds={PEOPLE_FOLDS}", f"task.validation={PEOPLE_VALIDATION}")
    runs |= {f"people {fold}": (*by_person, f"task.fold={fold}") for fold in range(PEOPLE_FOLDS)}
    return {name: runs[name] for name in ("seed 0", "5 days", "people 0")} if config.quick else runs


def words(overrides: tuple[str, ...], config: ExperimentConfig) -> list[str]:
    """The command line of a run."""
    seed = () if any(word.startswith("seed=") for word in overrides) else (f"seed={config.seed}",)
    return [*overrides, *seed, f"data.path={archive(config)}", *(QUICK if config.quick else ())]


def adapter(config: ExperimentConfig, tick: Tick) -> Values:
    """Scores of the test rows with SmolLM2, and those of ablations."""
    return trained((), config, tick, ablated=True)


def small_decoder(config: ExperimentConfig, tick: Tick) -> Values:
    """Trains the small decoder, and adapters in front of it; scores by run."""
    values = {}
    with trained_run(SMALL_CONFIG, small_words(config), tick) as decoder:
        chosen = (f"model.language_model={decoder}", "model.dtype=float32", "model.tokens=10", *SMALL_PROMPT)
        for name, overrides in small_runs(config).items():
            values[name] = trained((*overrides, *chosen), config, tick, ablated=False)
    return values


def small_words(config: ExperimentConfig) -> list[str]:
    """The command line of the small decoder's run."""
    return [f"seed={config.seed}", f"train.steps={2 if config.quick else SMALL_STEPS}"]


def trained(overrides: tuple[str, ...], config: ExperimentConfig, tick: Tick, *, ablated: bool) -> Values:
    """Scores of the test rows by one training run."""
    given = dict(word.split("=", 1) for word in overrides)
    cohort = load_cohort("pmdata", archive(config), days=int(given.get("data.days", DAYS)))
    people = given.get("task.fold")
    rows = (split(cohort) if people is None else people_folds(cohort)[int(people)]).test
    rows = rows[::QUICK_EVERY] if config.quick else rows
    with trained_run(CONFIG, words(overrides, config), tick) as run:
        model = load_sensors(run)
        numbers_NF = model.statistics.standardised(cohort, rows)
        values: Values = {"scores": model.scores(numbers_NF).tolist(), "rows": rows.tolist()}
        return {**values, **(ablations(model, numbers_NF, config) if ablated else {})}


def ablations(trained: TrainedSensors, numbers_NF: np.ndarray, config: ExperimentConfig) -> Values:
    """Scores with numbers of other rows, with noise, and with virtual tokens of zeros."""
    random = np.random.default_rng(config.seed)
    given = {"permuted": numbers_NF[random.permutation(len(numbers_NF))]}
    for size in NOISE:
        given[f"noise {size:g}"] = (numbers_NF + size * random.standard_normal(numbers_NF.shape)).astype(np.float32)
    values = {name: trained.scores(numbers).tolist() for name, numbers in given.items()}
    sizes = trained.adapter.config
    zeroed_Q = trained.scores_of(torch.zeros(1, sizes.tokens, sizes.width))
    return {**values, "zeroed": zeroed_Q.repeat(len(numbers_NF), axis=0).tolist()}


# --- what it is compared with -------------------------------------------------------------------------------------


def outcomes(cohort: Cohort) -> np.ndarray:
    """[N, Q], NaN where a question has no answer."""
    return SensorQuestions().outcomes(cohort)


def regression(cohort: Cohort, fold: Fold, learned: np.ndarray) -> np.ndarray:
    """Probabilities [test rows, Q] by logistic regression on the adapter's numbers. Of the penalties, the one with the
    best mean AUROC on the validation rows."""
    numbers_NF, labels_NQ = sensor_numbers(cohort), outcomes(cohort)
    given = [learned[~np.isnan(label_N[learned])] for label_N in labels_NQ.T]
    rows = fold.validation[~np.isnan(labels_NQ[fold.validation]).any(axis=1)]
    best, predicted_NQ = -np.inf, np.empty(0)
    for strength in STRENGTHS:
        fitted = [
            fit_logistic_regression(numbers_NF[known], label_N[known], strength=strength)
            for known, label_N in zip(given, labels_NQ.T, strict=True)
        ]
        reached = macro_auroc(1)(labels_NQ[rows], np.stack([predict(numbers_NF[rows]) for predict in fitted], axis=1))
        if reached > best:
            best = reached
            predicted_NQ = np.stack([predict(numbers_NF[fold.test]) for predict in fitted], axis=1)
    return predicted_NQ


def person_means(cohort: Cohort, fold: Fold) -> np.ndarray:
    """[test rows, Q]: the share of yes among each person's training rows, with one row of the mean of all added."""
    people, labels_NQ = np.array(cohort.patient_ids), outcomes(cohort)
    given_NQ, person_N = labels_NQ[fold.train], people[fold.train]
    mean_Q = np.nanmean(given_NQ, axis=0)
    by_person = {
        person: (np.nansum(given_NQ[person_N == person], axis=0) + mean_Q)
        / ((~np.isnan(given_NQ[person_N == person])).sum(axis=0) + 1)
        for person in np.unique(people)
    }
    return np.stack([by_person[person] for person in people[fold.test]])


def compared(config: ExperimentConfig, tick: Tick) -> Values:
    """Labels and people of all rows, and scores of what an adapter is compared with, of the same test rows."""
    cohort = load_cohort("pmdata", archive(config), days=DAYS)
    fold = split(cohort)
    half = fold.train[np.arange(len(fold.train) // 2) * 2]
    values: Values = {
        "labels": outcomes(cohort).tolist(),
        "people": list(cohort.patient_ids or ()),
        "parts": {name: len(getattr(fold, name)) for name in ("train", "validation", "test")},
        "rows": fold.test.tolist(),
        "logistic regression": regression(cohort, fold, fold.train).tolist(),
        "logistic regression, half of the rows": regression(cohort, fold, half).tolist(),
        "person's mean": person_means(cohort, fold).tolist(),
    }
    for days in WINDOWS:
        shorter = load_cohort("pmdata", archive(config), days=days)
        values[f"logistic regression, {days} days"] = regression(shorter, fold, fold.train).tolist()
    by_person = [regression(cohort, each, each.train) for each in people_folds(cohort)]
    values["by person"] = np.concatenate(by_person).tolist()
    values["by person, rows"] = np.concatenate([each.test for each in people_folds(cohort)]).tolist()
    tick()
    return values


# --- numbers as text ----------------------------------------------------------------------------------------------


def in_words(names: tuple[str, ...], numbers_F: np.ndarray) -> str:
    """Means and standard deviations as text: "sleep minutes 412 (sd 35), ..."."""
    parts = []
    for place, name in enumerate(names):
        mean, variance = numbers_F[2 * place], numbers_F[2 * place + 1]
        if not np.isnan(mean):
            parts.append(f"{name.replace('_', ' ')} {mean:.0f} (sd {variance**0.5:.0f})")
    return f"A wristband measured a person for {DAYS} days, mean a day: {', '.join(parts)}."


@torch.no_grad()
def as_text(config: ExperimentConfig, tick: Tick) -> Values:
    """Scores of the language model without an adapter, which reads the numbers in words."""
    cohort = load_cohort("pmdata", archive(config), days=DAYS)
    rows = split(cohort).test[:: text_every(config)]
    frozen, asked = FrozenLM.load("smollm2", "bfloat16"), SensorQuestions()
    ends = [frozen.tokenizer.encode(f" {text} Answer:") for text in asked.questions.values()]
    lengths = torch.tensor([len(ids) for ids in ends])
    longest = int(lengths.max())
    ids_QT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in ends])
    no, yes = (frozen.tokenizer.encode(answer)[0] for answer in asked.answers)
    scores = []
    for numbers_F in sensor_numbers(cohort, rows):
        text = frozen.tokenizer.encode(in_words(tuple(PMDATA), numbers_F), bos=True)
        state = frozen.model.init_state(1, len(text) + longest)
        _, state = frozen.model.extend_hidden(torch.tensor([text]), state)
        state = state.map(lambda _, tensor: tensor.repeat_interleave(len(ends), 0))
        hidden_QTD, _ = frozen.model.extend_hidden(ids_QT, state, lengths)
        logits_QV = frozen.model.logits(hidden_QTD[torch.arange(len(ends)), lengths - 1]).float()
        scores.append((logits_QV[:, yes] - logits_QV[:, no]).tolist())
        tick()
    return {"scores": scores, "rows": rows.tolist()}


def text_every(config: ExperimentConfig) -> int:
    """Of so many test days one is read as text."""
    return 60 if config.quick else TEXT_EVERY


# --- published tables ---------------------------------------------------------------------------------------------


def published(config: ExperimentConfig, tick: Tick) -> Values:
    """Means over targets of the published results by model, and the published ratings of pairs of experts, if the
    tables are there."""
    values: Values = {}
    if (path := found(config, PREDICTIONS)) is not None:
        results: dict[str, dict[str, list[float]]] = {}
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                model = row["model_name"].partition("_binary_")[2]
                results.setdefault(model, {}).setdefault(row["metric_name"], []).append(float(row["mean"]))
        values["predictions"] = results
    for area in ("sleep", "fitness"):
        if (path := found(config, RATINGS.format(area))) is not None:
            both = pooled(all_pairs(read_ratings(path)))
            values[area] = {"first": both.first.tolist(), "second": both.second.tolist()}
    tick()
    return values


# --- the experiment -----------------------------------------------------------------------------------------------


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """Trainings, and what they are compared with. Raises ValueError without PMData."""
    runs = sum(run_steps(CONFIG, words(overrides, config)) for overrides in small_runs(config).values())
    rows = len(split(load_cohort("pmdata", archive(config), days=DAYS)).test[:: text_every(config)])
    return {
        "adapter": ExperimentPart(adapter, run_steps(CONFIG, words((), config))),
        "small decoder": ExperimentPart(small_decoder, runs + run_steps(SMALL_CONFIG, small_words(config))),
        "as text": ExperimentPart(as_text, rows),
        "compared": ExperimentPart(compared, 1),
        "published": ExperimentPart(published, 1),
    }


EXPERIMENT = Experiment(
    "ph-llm",
    "H",
    "PH-LLM's sensor adapter in front of a frozen language model",
    parts,
    judge,
    draw,
    data=f"a folder with PMData's {ARCHIVE} (datasets.simula.no/pmdata), and for the published results the tables of "
    f"github.com/Google-Health/consumer-health-research ({PREDICTIONS}, *_human_expert_ratings.tsv.gz)",
)
