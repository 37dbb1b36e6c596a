"""Judges experiment P: reads what the parts have drawn, and compares the arms case by case."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnzoo.intervals import bootstrap_mean, wilson
from train.experiments.base import ExperimentConfig, Judgement, Values
from train.experiments.composition.arms import ARMS, FULL, INVERSION, NO_REGION, PASTE
from train.experiments.composition.cases import CompositionCase, make_cases, world_of
from train.experiments.composition.crops import cut
from train.experiments.composition.plan import Sizes, cases_of, model_of, part_name, prompts_of
from train.experiments.composition.reader import from_arrays, read
from train.experiments.composition.realism import classifier_two_sample, kernel_distance
from train.experiments.composition.scores import LEAK, METRICS, RANK, SEAM, STYLE, Readers, Wanted, scores
from train.experiments.composition.validity import PAIRS, WRONG, pair_table

READ_PICTURES, READ_SQUARES, PROMPTS = "reader of pictures", "reader of squares", "prompts"
ANSWER = "right answer"
MEASURED = "measured"
"""Where `judge` leaves in the values what `draw` needs, so that it is measured once."""
OTHER_CASES = 500
"""Added to seeds for cases that no arm has composed: those of the metrics' test and of comparisons of sets."""
PLAIN, GATE, ORDERED, CONTROL = 0.97, 0.85, 0.95, 0.06
"""What is expected: of readers on plain pictures, of drawn prompts, of metrics on known pictures, and how far from 0.5
right answers may be told from right answers."""
SOME = 1e-6
"""A difference that is one: equal arms are not better than each other."""


@dataclass(frozen=True)
class Measured:
    """scores: by arm (controls too) and metric, [N]. style_N: names of styles. features: of squares by arm, [N, D].
    cost: mean seconds and forwards of a case by arm."""

    scores: dict[str, dict[str, np.ndarray]]
    style_N: np.ndarray
    features: dict[str, np.ndarray]
    cost: dict[str, tuple[float, float]]


def readers_of(values: dict[str, Values], styles: Sequence[str]) -> Readers:
    """The two readers that the parts have trained."""
    whole, square = (
        from_arrays({key.removeprefix("weights "): w for key, w in values[name].items() if key.startswith("weights ")})
        for name in (READ_PICTURES, READ_SQUARES)
    )
    return Readers(whole, square, tuple(styles))


def measure(config: ExperimentConfig, values: dict[str, Values], readers: Readers) -> Measured:
    """Every metric of every arm on all cases."""
    sizes, found, styles = Sizes.of(config), [], []
    cost = dict.fromkeys(ARMS, (0.0, 0.0))
    for seed in range(sizes.seeds):
        cases = cases_of(config, seed)
        images = {ANSWER: np.stack([c.answer for c in cases]), WRONG: np.stack([c.wrong for c in cases])}
        images |= {arm: np.zeros_like(images[ANSWER]) for arm in ARMS}
        for at, style in enumerate(readers.styles):
            rows = [index for index, case in enumerate(cases) if case.style == style]
            for number in range(sizes.chunks(at, len(readers.styles))):
                part = values[part_name(seed, style, number)]
                here = rows[number * sizes.chunk : (number + 1) * sizes.chunk]
                for arm in ARMS:
                    images[arm][here] = part[f"images {arm}"]
                    added = (float(part[f"seconds {arm}"]), float(part[f"forwards {arm}"]))
                    cost[arm] = (cost[arm][0] + added[0], cost[arm][1] + added[1])
        styles += [case.style for case in cases]
        found.append({arm: _of_arm(readers, cases, x) for arm, x in images.items()})
    joined = {
        arm: {name: np.concatenate([each[arm][name] for each in found]) for name in found[0][arm]} for arm in found[0]
    }
    return Measured(
        {arm: {name: parts[name] for name in METRICS} for arm, parts in joined.items()},
        np.array(styles),
        {arm: parts["features"] for arm, parts in joined.items()},
        {arm: (seconds / len(styles), forwards / len(styles)) for arm, (seconds, forwards) in cost.items()},
    )


def _of_arm(readers: Readers, cases: Sequence[CompositionCase], images: np.ndarray) -> dict[str, np.ndarray]:
    return {**scores(readers, cases, images), "features": _features(readers, cases, images)}


def _features(readers: Readers, cases: Sequence[CompositionCase], images: np.ndarray) -> np.ndarray:
    """What the reader of squares finds around the objects."""
    squares = cut(images, Wanted.of(cases, readers.styles).squares_N3)
    return read(readers.square, squares).features_ND


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """P1: readers and drawn prompts. P2: metrics on known pictures. P3: arms against each other. P4: control."""
    trained, sizes = model_of(config), Sizes.of(config)
    world, styles = world_of(trained.data), tuple(trained.data["styles"])
    readers, out = readers_of(values, styles), Judgement()
    _judge_readers(out, values, styles)
    _judge_prompts(out, config, values, readers)
    others = make_cases(world, styles, config.seed + OTHER_CASES, sizes.known)
    pairs = pair_table(readers, others, config.seed)
    out.table("P: metrics on known pictures", pairs)
    for row in pairs[: len(PAIRS)]:
        name = f"P2 {row['metric']}: {row['better']} before {row['worse']}, AUC"
        out.add(name, ORDERED, float(str(row["AUC"])), kind="at_least")
    found = measure(config, values, readers)
    values[MEASURED] = {"found": found, "font": world.options.font}
    _judge_arms(out, found)
    count = len(found.style_N)
    real, again = (make_cases(world, styles, config.seed + OTHER_CASES + number, max(count, 8)) for number in (1, 2))
    sets = {name: _features(readers, cases, np.stack([c.answer for c in cases])) for name, cases in
            (("real", real), ("again", again))}  # fmt: skip
    _judge_realism(out, found, sets["real"], sets["again"])
    return out


def _judge_readers(out: Judgement, values: dict[str, Values], styles: Sequence[str]) -> None:
    """P1, the readers: shares of held-out pictures, by style."""
    rows = []
    for name in (READ_PICTURES, READ_SQUARES):
        part = values[name]
        for number, style in enumerate(styles):
            chosen = part["style"] == number
            share = {f"{what} read": float(part[f"right {what}"][chosen].mean()) for what in ("kinds", "style")}
            rows.append({"reader": name, "style": style, "pictures": int(chosen.sum()), **share})
            if style == "photo":
                out.add(f"P1 {name}: kinds read rightly, plain pictures", PLAIN, share["kinds read"], kind="at_least")
        rows[-1]["seconds of training"] = round(float(part["seconds"]), 1)
    out.table("P: readers on held-out pictures", rows)


def _judge_prompts(out: Judgement, config: ExperimentConfig, values: dict[str, Values], readers: Readers) -> None:
    """P1, the gate: the share of drawn pictures in which the prompted object is the most likely one."""
    trained = model_of(config)
    given, told = prompts_of(config, trained), read(readers.whole, values[PROMPTS]["images"])
    right = told.kind() == np.array([prompt.kind for prompt in given])
    style_right = told.styles_NS.argmax(1) == np.array([prompt.style for prompt in given])
    style_N = np.array([prompt.style for prompt in given])
    rows = []
    for name, chosen in [("all", style_N >= 0), *((s, style_N == n) for n, s in enumerate(readers.styles))]:
        low, high = wilson(int(right[chosen].sum()), int(chosen.sum()))
        share = {"object": float(right[chosen].mean()), "low": low, "high": high}
        rows.append({"style": name, "pictures": int(chosen.sum()), **share,
                     "style read": float(style_right[chosen].mean())})  # fmt: skip
    out.table("P: drawn prompts", rows)
    names = world_of(trained.data).names
    kind_N = np.array([prompt.kind for prompt in given])
    by_kind = [{"object": name, "read": float(right[kind_N == kind].mean())} for kind, name in enumerate(names)]
    out.table("P: drawn prompts by object", sorted(by_kind, key=lambda row: (row["read"], row["object"])))
    out.add("P1 drawn prompts: the prompted object is read", GATE, float(right.mean()), kind="at_least")


def _judge_arms(out: Judgement, found: Measured) -> None:
    """P3: means with intervals, and PrimeComposer less each other arm, on the same cases."""
    rows: list[dict[str, Any]] = []
    for arm, of in found.scores.items():
        row: dict[str, Any] = {"arm": arm, **{name: told(of[name]) for name in METRICS}}
        row["rank 1"] = float((of[RANK] == 1).mean())
        if arm in found.cost:
            row |= {"seconds": round(found.cost[arm][0], 2), "forwards": round(found.cost[arm][1], 1)}
        rows.append(row)
    out.table("P: arms", rows)
    for style in dict.fromkeys(found.style_N.tolist()):
        here = found.style_N == style
        out.table("P: arms by style", [
            {"style": style, "arm": arm, **{name: float(of[name][here].mean()) for name in METRICS}}
            for arm, of in found.scores.items()
        ])  # fmt: skip
    bounds, rows = {}, []
    for arm in (name for name in ARMS if name != FULL):
        for metric in METRICS:
            difference_N = found.scores[FULL][metric] - found.scores[arm][metric]
            low, high = bounds[arm, metric] = bootstrap_mean(difference_N)
            rows.append({"metric": metric, "PrimeComposer less": arm, "difference": float(difference_N.mean()),
                         "low": low, "high": high})  # fmt: skip
    out.table("P: paired differences", rows)
    out.add(f"P3 {STYLE}, less {PASTE}: low bound", SOME, bounds[PASTE, STYLE][0], kind="at_least")
    for metric, arm in ((SEAM, PASTE), (RANK, INVERSION), (LEAK, NO_REGION)):
        out.add(f"P3 {metric}, less {arm}: high bound", -SOME, bounds[arm, metric][1], kind="at_most")


def _judge_realism(out: Judgement, found: Measured, real_ND: np.ndarray, again_ND: np.ndarray) -> None:
    """P4: how well sets of objects are told from right answers of other scenes."""
    rows, areas = [], {}
    for name, features_ND in {"other right answers": again_ND, **found.features}.items():
        areas[name] = classifier_two_sample(real_ND, features_ND)
        distance, spread = kernel_distance(real_ND, features_ND)
        rows.append({"set": name, "C2ST AUC": areas[name], "KID": distance, "KID over subsets, SD": spread})
    out.table("P: told from right answers", rows)
    out.add("P4 right answers told from right answers, AUC", 0.5, areas["other right answers"], CONTROL, kind="equal")


def told(values_N: np.ndarray) -> str:
    """A mean with its interval."""
    low, high = bootstrap_mean(values_N)
    return f"{values_N.mean():.3f} ({low:.3f} to {high:.3f})"
