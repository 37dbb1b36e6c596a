"""Judges and draws experiment H (train/experiments/ph_llm.py)."""

from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.clinical.agreement import LIKERT, exact_agreement, gwet_ac2, icc, weighted_kappa
from attnzoo.clinical.bootstrap import interval, paired_difference
from attnzoo.clinical.metrics import auprc, auroc, macro_auroc
from attnzoo.figures import save
from train.experiments.base import ExperimentConfig, Judgement, Values
from train.experiments.figures import axes_of

RESAMPLES = 1000
"""Of every bootstrap."""
QUESTIONS = ("fatigue", "mood", "readiness", "sleep_quality", "soreness", "stress")
PUBLISHED: dict[str, tuple[str, float, float | None]] = {
    "llm": ("adapter", 0.638, 0.120),
    "logreg_2914_data": ("logistic regression", 0.638, 0.141),
    "cnn": ("CNN", 0.610, 0.115),
    "llm_zero_shot": ("numbers as text, no example", 0.494, None),
    "llm_few_shot": ("numbers as text, few examples", 0.499, None),
    "llm_1457_data": ("adapter, 1,457 of 2,914 rows", 0.637, None),
    "llm_window10": ("adapter, 10 days", 0.636, None),
    "llm_window5": ("adapter, 5 days", 0.606, None),
    "llm_gaussian_0p001": ("adapter, noise .001", 0.631, None),
    "llm_gaussian_0p01": ("adapter, noise .01", 0.613, None),
    "llm_gaussian_0p1": ("adapter, noise .1", 0.633, None),
}
"""By name in the published table: what it is, mean AUROC and AUPRC over its 16 questions to three digits."""
AGREEMENT = {
    "sleep": (0.626, 0.234, 0.290, 0.906, 0.290),
    "fitness": (0.652, 0.071, 0.069, 0.939, 0.069),
}
"""Exact agreement, linear and quadratic kappa, AC2, ICC(2,1) of all pairs of experts."""
DIGITS = 0.0005000001
"""Equal to three digits."""
CHANCE = 0.05
"""How far from .5 the mean AUROC of scores without information may lie: about two standard errors."""

ADAPTER, REGRESSION, MEAN = "adapter, SmolLM2", "logistic regression", "person's mean"
PERMUTED, ZEROED = f"{ADAPTER}, numbers of other rows", f"{ADAPTER}, tokens of zeros"
"""Contenders, as the tables call them."""


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims H1 to H6."""
    out = Judgement()
    _judge_published(out, values["published"])
    _judge_adapter(out, values)
    _judge_people(out, values)
    out.table(
        "H: what is not checked",
        [
            {"what": "the 16 questions of the paper", "why": "its people's data are not published; PMData asks 6"},
            {"what": "the paper's language model", "why": "Gemini is not published; SmolLM2-135M stands in its place"},
            {
                "what": "coaching in sleep and fitness, exams",
                "why": "needs that model; the ratings of its texts are H2",
            },
        ],
    )
    return out


# --- published tables ---------------------------------------------------------------------------------------------


def _judge_published(out: Judgement, values: Values) -> None:
    results = values.get("predictions", {})
    rows: list[dict[str, Any]] = []
    for model, (what, expected, expected_auprc) in PUBLISHED.items():
        if model not in results:
            continue
        found = {name: float(np.mean(results[model][name])) for name in ("auc", "auprc")}
        rows.append({"published predictions": what, "questions": len(results[model]["auc"]), **found})
        out.add(f"H1 published mean AUROC: {what}", expected, found["auc"], DIGITS, "equal")
        if expected_auprc is not None:
            out.add(f"H1 published mean AUPRC: {what}", expected_auprc, found["auprc"], DIGITS, "equal")
    if rows:
        gain = rows[0]["auc"] - rows[1]["auc"]
        out.add(
            "H1 published AUROC, adapter less logistic regression: within a standard error", 0.0, gain, 0.01, "equal"
        )
        out.table("H: published results, means over questions", rows)
    linear, quadratic = weighted_kappa(LIKERT, "linear"), weighted_kappa(LIKERT, "quadratic")
    metrics = (exact_agreement, linear, quadratic, gwet_ac2(LIKERT), icc)
    rows = []
    for area, expected_M in AGREEMENT.items():
        if area in values:
            found_M = [metric(values[area]["first"], values[area]["second"]) for metric in metrics]
            names = [metric.name for metric in metrics]
            rows.append(
                {"experts": area, "pairs": len(values[area]["first"]), **dict(zip(names, found_M, strict=True))}
            )
            for name, wanted, measured in zip(names, expected_M, found_M, strict=True):
                out.add(f"H2 published ratings, {area}: {name}", wanted, measured, DIGITS, "equal")
    if rows:
        out.table("H: agreement of experts about published texts", rows)


# --- PMData, split in time ----------------------------------------------------------------------------------------


def _rows(values: dict[str, Values], rows: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels, people, which of these rows have an answer to every question)."""
    labels_NQ = np.array(values["compared"]["labels"])[rows]
    people_N = np.array(values["compared"]["people"])[rows]
    whole = ~np.isnan(labels_NQ).any(axis=1)
    return labels_NQ[whole], people_N[whole], whole


def contenders(values: dict[str, Values]) -> tuple[list[int], dict[str, np.ndarray]]:
    """(test rows of the split in time, scores [rows, Q] by what gave them)."""
    compared, main, small = values["compared"], values["adapter"], values["small decoder"]
    place = {row: i for i, row in enumerate(compared["rows"])}
    chosen = [place[row] for row in main["rows"]]

    def of(name: str) -> np.ndarray:
        return np.array(compared[name])[chosen]

    found = {ADAPTER: main["scores"], REGRESSION: of("logistic regression"), MEAN: of(MEAN)}
    for name, run in small.items():
        if not name.startswith("people "):
            found[f"adapter, small decoder, {name}"] = run["scores"]
            if not name.startswith("seed "):
                found[f"{REGRESSION}, {name}"] = of(f"{REGRESSION}, {name}")
    for name, scores in main.items():
        if name.startswith("noise "):
            found[f"{ADAPTER}, {name}"] = scores
    found |= {PERMUTED: main["permuted"], ZEROED: main["zeroed"]}
    return main["rows"], {name: np.array(scores) for name, scores in found.items()}


def _judge_adapter(out: Judgement, values: dict[str, Values]) -> None:
    order, every = contenders(values)
    labels_NQ, people_N, whole = _rows(values, order)
    metric, found = macro_auroc(1), {name: scores[whole] for name, scores in every.items()}
    rows: list[dict[str, Any]] = []
    for name, scores_NQ in found.items():
        pairs = list(zip(labels_NQ.T, scores_NQ.T, strict=True))
        by_question = {question: auroc(*pair) for question, pair in zip(QUESTIONS, pairs, strict=True)}
        means = {**_interval(labels_NQ, scores_NQ, people_N), "mean AUPRC": float(np.mean([auprc(*p) for p in pairs]))}
        rows.append({"PMData, split in time": name, **means, **by_question})
    out.table("H: PMData, the last 30 % of each person's days", rows)
    reached = {row["PMData, split in time"]: row["mean AUROC"] for row in rows}
    out.add(
        "H3 mean AUROC, SmolLM2: at least logistic regression's", reached[REGRESSION], reached[ADAPTER], 0.0, "at_least"
    )
    seeds = [value for name, value in reached.items() if name.startswith("adapter, small decoder, seed")]
    mean = float(np.mean(seeds))
    out.add(
        "H3 mean AUROC, small decoder, mean of seeds: at least logistic regression's",
        reached[REGRESSION],
        mean,
        0.0,
        "at_least",
    )
    out.add("H4 mean AUROC, numbers of other rows", 0.5, reached[PERMUTED], CHANCE, "equal")
    out.add("H4 mean AUROC, tokens of zeros", 0.5, reached[ZEROED], 1e-9, "equal")
    differences: list[dict[str, Any]] = []
    for other in (PERMUTED, REGRESSION, MEAN, "adapter, small decoder, seed 0"):
        gap = paired_difference(metric, labels_NQ, found[ADAPTER], found[other], people_N, resamples=RESAMPLES)
        differences.append({f"{ADAPTER} less": other, "difference": gap.value, "from": gap.low, "to": gap.high})
    out.add(
        "H4 SmolLM2 less numbers of other rows: the interval excludes 0", 0.0, differences[0]["from"], 0.0, "at_least"
    )
    out.table("H: differences of mean AUROC, by a bootstrap over people", differences)
    out.table("H: in short", [{"in short": in_short(rows[0], reached, differences)}])
    _judge_text(out, values, dict(zip(order, every[ADAPTER], strict=True)))


def in_short(adapter: dict[str, Any], reached: dict[str, float], differences: list[dict[str, Any]]) -> str:
    """What came out, in two sentences. adapter: its row of the table; differences: the rows of the second table."""
    told = {}
    for row in differences:
        more = "better than" if row["from"] > 0 else "worse than" if row["to"] < 0 else "not told apart from"
        told[next(iter(row.values()))] = more
    return (
        f"On later days of people who are known, the adapter in front of SmolLM2 reaches a mean AUROC of "
        f"{adapter['mean AUROC']:.3f} ({adapter['from']:.3f} to {adapter['to']:.3f}): {told[REGRESSION]} logistic "
        f"regression on the same numbers ({reached[REGRESSION]:.3f}), {told[MEAN]} each person's own mean "
        f"({reached[MEAN]:.3f}), {told[PERMUTED]} the numbers of other rows ({reached[PERMUTED]:.3f}). That it beats "
        "logistic regression is not shown by the paper either."
    )


def _judge_text(out: Judgement, values: dict[str, Values], adapter: dict[int, np.ndarray]) -> None:
    """The language model that reads the numbers in words, on the days that the adapter was judged on as well."""
    told = dict(zip(values["as text"]["rows"], values["as text"]["scores"], strict=True))
    order = [row for row in told if row in adapter]
    labels_NQ, people_N, whole = _rows(values, order)
    rows: list[dict[str, Any]] = []
    for name, scores in (("numbers as text", told), (ADAPTER, adapter)):
        scores_NQ = np.array([scores[row] for row in order])[whole]
        rows.append({"on the days read as text": name, **_interval(labels_NQ, scores_NQ, people_N)})
    out.table("H: the language model alone, which reads the numbers in words", rows)
    out.add("H5 mean AUROC, numbers as text: near chance", 0.5, rows[0]["mean AUROC"], 0.06, "equal")


def _judge_people(out: Judgement, values: dict[str, Values]) -> None:
    """People who were never seen."""
    runs = [run for name, run in values["small decoder"].items() if name.startswith("people ")]
    order = [row for run in runs for row in run["rows"]]
    labels_NQ, people_N, whole = _rows(values, order)
    place = {row: i for i, row in enumerate(values["compared"]["by person, rows"])}
    regression_NQ = np.array(values["compared"]["by person"])[[place[row] for row in order]]
    scores_NQ = np.concatenate([run["scores"] for run in runs])
    rows: list[dict[str, Any]] = []
    for name, found_NQ in (("adapter, small decoder", scores_NQ), (REGRESSION, regression_NQ)):
        rows.append({"PMData, split by person": name, **_interval(labels_NQ, found_NQ[whole], people_N)})
    out.table("H: PMData, people who were never seen", rows)
    out.add("H6 mean AUROC of people never seen: no better than chance", 0.5, rows[0]["mean AUROC"], CHANCE, "at_most")


def _interval(labels_NQ: np.ndarray, scores_NQ: np.ndarray, people_N: np.ndarray) -> dict[str, float]:
    seen = interval(macro_auroc(1), labels_NQ, scores_NQ, people_N, resamples=RESAMPLES)
    return {"mean AUROC": seen.value, "from": seen.low, "to": seen.high}


# --- the figure ---------------------------------------------------------------------------------------------------


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws the mean AUROC of every contender with its interval."""
    order, found = contenders(values)
    labels_NQ, people_N, whole = _rows(values, order)
    figure, (ax,) = axes_of(1, 5.0)
    figure.set_size_inches(8, 5.5)
    for place, (name, scores_NQ) in enumerate(reversed(found.items())):
        seen = _interval(labels_NQ, scores_NQ[whole], people_N)
        colour = "C0" if name.startswith("adapter") else "C1" if name.startswith("logistic") else "C2"
        ax.plot([seen["from"], seen["to"]], [place, place], color=colour)
        ax.plot([seen["mean AUROC"]], [place], "o", color=colour)
    ax.axvline(0.5, linestyle="--", color="black", linewidth=0.8)
    ax.set_yticks(range(len(found)), list(reversed(found)), fontsize=8)
    ax.set(
        xlabel="mean AUROC over six questions, 95 % over people", title="PMData, the last 30 % of each person's days"
    )
    return [save(figure, directory / "ph_llm.png")]
