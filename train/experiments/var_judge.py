"""The judgement of experiment V: sinks by layer, accuracy by arm, and paired differences with McNemar's test."""

from math import comb
from typing import Any

import numpy as np

from attnzoo.intervals import bootstrap_mean, wilson
from train.experiments.base import ExperimentConfig, Judgement, Values
from train.experiments.var_arms import UNEDITED, VAR

SINKS = "sinks"
REACHED = {"presence_random": 0.95, "side": 0.90, "count": 0.85}
"""What a small model is to reach on scenes that it has not seen."""


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact two-sided p of McNemar's test: whether two arms, each right or not on the same questions, differ.

    >>> mcnemar(np.array([True, True, True]), np.array([False, False, False]))
    0.25
    """
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    count = won + lost
    tail = sum(comb(count, k) for k in range(min(won, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """Rows and claims."""
    found, judged = values[SINKS], Judgement()
    kinds = np.array(found["kinds"])
    names = list(dict.fromkeys(found["kinds"]))
    right = {name: np.array(part["right"]) for name, part in values.items() if name != SINKS}
    judged.table("V: sinks by layer", [_layer(each) for each in found["layers"]])
    told = {"blind": np.array(found["blind"]), "majority": np.array(found["majority"]), **right}
    judged.table("V: accuracy by kind of question", [_accuracy(name, x, kinds, names) for name, x in told.items()])
    plain = right[UNEDITED]
    judged.table("V: paired differences", [_paired(name, x, plain) for name, x in right.items() if name != UNEDITED])
    for kind, least in REACHED.items():
        judged.add(f"V1 {kind}: accuracy", least, float(plain[kinds == kind].mean()), kind="at_least")
    with_sinks = sum(not each["reason"] for each in found["layers"])
    judged.add("V2 layers with sinks", 1, with_sinks, kind="at_least")
    if VAR in right:
        low, _ = bootstrap_mean(right[VAR].astype(float) - plain)
        judged.add("V3 redistribution less unedited: lower bound", 0.0, low, kind="at_least")
    return judged


def _layer(each: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": each["layer"],
        "first token, times its rms": each["first"],
        "nearly all others": each["others"],
        "first token": each["raw"],
        "median": each["median"],
        "sinks in the picture": each["sinks"],
        "massive in the picture": each["picture"],
        "sinks": each["reason"].partition(":")[0] or "yes",
    }


def _accuracy(name: str, right_Q: np.ndarray, kinds: np.ndarray, names: list[str]) -> dict[str, Any]:
    low, high = wilson(int(right_Q.sum()), len(right_Q))
    by_kind = {kind: float(right_Q[kinds == kind].mean()) for kind in names}
    return {"arm": name, "all": float(right_Q.mean()), "from": low, "to": high, **by_kind}


def _paired(name: str, right_Q: np.ndarray, plain_Q: np.ndarray) -> dict[str, Any]:
    difference_Q = right_Q.astype(float) - plain_Q
    low, high = bootstrap_mean(difference_Q)
    return {
        "arm": name,
        "less unedited": float(difference_Q.mean()),
        "from": low,
        "to": high,
        "won": int((difference_Q > 0).sum()),
        "lost": int((difference_Q < 0).sum()),
        "McNemar p": mcnemar(right_Q, plain_Q),
        "questions": len(plain_Q),
    }
