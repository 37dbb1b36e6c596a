"""Experiment N's verdict: figures of all folds together, differences of models on the same rows, explanations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnzoo.clinical import checks
from attnzoo.clinical.bootstrap import Interval, interval, paired_difference
from attnzoo.clinical.faithfulness import SHARES, Faithfulness, Removal, summarise
from attnzoo.clinical.metrics import Metric, auroc, frequent_labels, macro_auroc, mean
from attnzoo.figures import panels, save
from train.experiments.base import ExperimentConfig, Judgement, Values

LEAST = 10
"""Rows that a label has at least to be in the macro AUROC."""
SETTINGS = ((1, 1.0), (1, 10.0), (1, 100.0), (2, 1.0), (2, 10.0), (2, 100.0))
"""(longest sequence of words, inverse of the penalty) of logistic regression."""
SEEDS = (0, 1, 2)
FORMS: dict[str, tuple[str, ...]] = {
    "LDAM": (),
    "no definitions": ("model.labels=none",),
    "no linear head": ("model.skip=false",),
    "attention of the paper": ("model.skip=false", "model.mean=false", "model.pooling=shared"),
}
"""What each form changes of configs/ldam-sections.yaml."""
REMOVED = ("comprehensiveness_NK", "sufficiency_NK", "difference_N", "preservation_N")
CHANCE = "chance"
TFIDF = "tf-idf, logistic regression"


def _right(labels_NK: np.ndarray, found_NK: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    return mean(weights_RN, (labels_NK.argmax(1) == found_NK.argmax(1)).astype(np.float64))


macro = macro_auroc(LEAST)
accuracy = Metric("accuracy", _right, checks.many_labels)


def on_validation(labels_NK: np.ndarray, validated: np.ndarray, found_NK: np.ndarray) -> float:
    """Macro AUROC on validation rows over the labels that test rows are judged by."""
    kept = frequent_labels(labels_NK, LEAST)
    return macro_auroc(1)(validated[:, kept], found_NK[:, kept])


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """Rows and claims."""
    judged, made = Judgement(), values["rows"]
    count = sum(name.startswith("LDAM, seed") and f"seed {config.seed}," in name for name in values)
    test, validation = (np.concatenate(made[part][:count]) for part in ("test", "validation"))
    labels_NK = np.array(made["labels"])
    tested, validated = labels_NK[test], labels_NK[validation]
    found = {name: _pooled(config, values, name, count) for name in FORMS}
    chosen, settings = _regressions(values["tf-idf"], tested, validated)
    found[TFIDF] = {"validation": chosen[0], "test": chosen[1]}
    for name in ("LDAM", "no definitions"):
        if more := [_pooled(config, values, name, count, seed) for seed in _seeds(values, name)][1:]:
            all_of = [found[name], *more]
            found[f"{name}, {len(all_of)} seeds"] = {
                part: np.mean([one[part] for one in all_of], axis=0) for part in ("validation", "test")
            }
    order = sorted(found, key=lambda name: -macro(tested, found[name]["test"]))
    judged.table(
        "N: test rows of all folds",
        [
            {
                "model": name,
                "macro AUROC": _shown(interval(macro, tested, found[name]["test"], test)),
                "accuracy": _shown(interval(accuracy, tested, found[name]["test"], test)),
                "on validation": round(on_validation(tested, validated, found[name]["validation"]), 4),
            }
            for name in order
        ],
    )
    _differences(judged, tested, {name: one["test"] for name, one in found.items()}, test)
    _labels(judged, made["names"], labels_NK, tested, found)
    judged.table("N: settings of logistic regression, on validation rows", settings)
    _seeds_table(judged, values, tested, config, count)
    _explanations(judged, config, values, count)
    judged.add("N1 dialogues", 1301, len(labels_NK))
    return judged


def _shown(found: Interval) -> str:
    return str(found)


def _seeds(values: dict[str, Values], form: str) -> list[int]:
    found = {int(name.split("seed ")[1].split(",")[0]) for name in values if name.startswith(f"{form}, seed")}
    return sorted(found)


def _pooled(
    config: ExperimentConfig, values: dict[str, Values], form: str, count: int, seed: int | None = None
) -> dict[str, np.ndarray]:
    """Probabilities of validation and test rows, fold after fold."""
    own = config.seed if seed is None else seed
    by_fold = [values[f"{form}, seed {own}, fold {fold}"] for fold in range(count)]
    return {part: np.concatenate([one[part] for one in by_fold]) for part in ("validation", "test")}


def _regressions(
    values: Values, tested: np.ndarray, validated: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], list[dict[str, Any]]]:
    """((validation, test) of the setting with the highest macro AUROC on validation rows, a row for each setting)."""
    told, rows = {}, []
    for name, by_fold in values.items():
        parts = [np.concatenate([one[part] for one in by_fold]) for part in ("validation", "test")]
        told[name] = (on_validation(tested, validated, parts[0]), parts[0], parts[1])
        ngrams, strength = name.split()
        right = accuracy(validated, parts[0])
        rows.append(
            {"words": ngrams, "C": strength, "macro AUROC": round(told[name][0], 4), "accuracy": round(right, 4)}
        )
    best = max(told, key=lambda name: told[name][0])
    return (told[best][1], told[best][2]), rows


def _differences(judged: Judgement, tested: np.ndarray, found: dict[str, np.ndarray], rows: np.ndarray) -> None:
    """Of the same rows, with intervals; and the claims that they make."""
    table = []
    pairs = [("LDAM", TFIDF), ("LDAM", "no definitions"), ("LDAM", "no linear head")]
    pairs += [(name, TFIDF) for name in found if name.endswith("seeds") and name.startswith("LDAM")]
    pairs += [
        (name, name.replace("LDAM", "no definitions"))
        for name in found
        if name.endswith("seeds") and name.startswith("LDAM")
    ]
    for number, (first, second) in enumerate(pairs):
        for metric in (macro, accuracy):
            gap = paired_difference(metric, tested, found[first], found[second], rows)
            table.append({"first": first, "second": second, "metric": metric.name, "first - second": _shown(gap)})
            if metric is macro and second in (TFIDF, "no definitions", "no definitions, 3 seeds"):
                name = f"N{2 + number} {first} - {second}, macro AUROC"
                judged.add(name, 0.0, gap.value, kind="at_least")
                judged.add(f"{name}: lower bound", 0.0, gap.low, kind="at_least")
    judged.table("N: paired differences", table)


def _labels(
    judged: Judgement, names: list[str], labels_NK: np.ndarray, tested: np.ndarray, found: dict[str, Any]
) -> None:
    shown = [name for name in ("LDAM", "no definitions", TFIDF) if name in found]
    judged.table(
        "N: AUROC by section",
        [
            {
                "section": names[k],
                "dialogues": int(labels_NK[:, k].sum()),
                **{name: round(auroc(tested[:, k], found[name]["test"][:, k]), 3) for name in shown},
            }
            for k in np.flatnonzero(frequent_labels(tested, LEAST))
        ],
    )


def _seeds_table(
    judged: Judgement, values: dict[str, Values], tested: np.ndarray, config: ExperimentConfig, count: int
) -> None:
    rows = []
    for form in FORMS:
        for seed in _seeds(values, form):
            test = _pooled(config, values, form, count, seed)["test"]
            own = values[f"{form}, seed {seed}, fold 0"]
            rows.append(
                {
                    "form": form,
                    "seed": seed,
                    "macro AUROC": round(macro(tested, test), 4),
                    "accuracy": round(accuracy(tested, test), 4),
                    "numbers": own["parameters"],
                    "seconds a fold": round(own["seconds"], 1),
                }
            )
    judged.table("N: by seed", rows)


def _explanations(judged: Judgement, config: ExperimentConfig, values: dict[str, Values], count: int) -> None:
    by_fold = [values[f"LDAM, seed {config.seed}, fold {fold}"] for fold in range(count)]
    measured = measured_maps(by_fold)
    judged.table(
        "N: words taken away, in log odds",
        [
            {
                "map": name,
                **{f"C {share:.0%}": one.comprehensiveness[i] for i, share in enumerate(SHARES)},
                **{f"S {share:.0%}": one.sufficiency[i] for i, share in enumerate(SHARES)},
                "more comprehensive than random": _shown(one.more_comprehensive),
                "less sufficient": _shown(one.less_sufficient),
                "beats random": "yes" if one.beats_random else "no",
            }
            for name, one in measured.items()
        ],
    )
    names = list(by_fold[0]["shuffled"])
    rho = {name: float(np.mean([one["shuffled"][name] for one in by_fold])) for name in names}
    judged.table(
        "N: rank correlation with shuffled weights", [{"map": k, "correlation": round(v, 3)} for k, v in rho.items()]
    )
    examples = [
        {key: ", ".join(value) if isinstance(value, list) else value for key, value in example.items()}
        for example in by_fold[0]["examples"]
    ]
    judged.table("N: words of two dialogues", examples)
    gradients = measured["integrated gradients"]
    missing = max(one["missing"] for one in by_fold)
    judged.add("N8 gradients: sums miss the difference by", 0.05, missing, kind="at_most")
    judged.add(
        "N9 gradients: comprehensiveness above random, lower bound",
        0.0,
        gradients.more_comprehensive.low,
        kind="at_least",
    )
    judged.add(
        "N9 gradients: sufficiency below random, lower bound", 0.0, gradients.less_sufficient.low, kind="at_least"
    )
    judged.add(
        "N10 gradients: correlation with shuffled weights", 0.3, abs(rho["integrated gradients"]), kind="at_most"
    )


def measured_maps(by_fold: list[Values]) -> dict[str, Faithfulness]:
    """The maps over the explained rows of all folds."""
    found = {}
    for name in by_fold[0]["removal"]:
        parts = {field: np.concatenate([one["removal"][name][field] for one in by_fold]) for field in REMOVED}
        found[name] = Removal(*(torch.from_numpy(parts[field]) for field in REMOVED))
    chance = found.pop(CHANCE)
    rows = range(len(chance.difference_N))
    return {name: summarise(name, one, chance, rows) for name, one in found.items()}


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """AUROC by section, and what removing words does."""
    made, seeds = values["rows"], _seeds(values, "LDAM")
    config = ExperimentConfig(seed=seeds[0])
    count = sum(name.startswith(f"LDAM, seed {seeds[0]},") for name in values)
    labels_NK = np.array(made["labels"])
    tested = labels_NK[np.concatenate(made["test"][:count])]
    validated = labels_NK[np.concatenate(made["validation"][:count])]
    kept = np.flatnonzero(frequent_labels(tested, LEAST))
    figure, axes = panels(1, 2, width=6.0)
    left, right = axes[0]
    models = {form: _pooled(config, values, form, count)["test"] for form in ("LDAM", "no definitions")}
    models[TFIDF] = _regressions(values["tf-idf"], tested, validated)[0][1]
    for name, found_NK in models.items():
        left.plot([auroc(tested[:, k], found_NK[:, k]) for k in kept], "o-", label=name, alpha=0.7)
    left.set_xticks(range(len(kept)), [made["names"][k] for k in kept], rotation=60, ha="right", fontsize=7)
    left.set_ylabel("AUROC")
    left.legend(fontsize=8)
    by_fold = [values[f"LDAM, seed {seeds[0]}, fold {fold}"] for fold in range(count)]
    for name, one in measured_maps(by_fold).items():
        right.plot([100 * share for share in SHARES], one.comprehensiveness, "o-", label=name)
    right.set_xlabel("words taken away, %")
    right.set_ylabel("fall of the log odds")
    right.set_xscale("log")
    right.legend(fontsize=8)
    return [save(figure, directory / "ldam.png")]
