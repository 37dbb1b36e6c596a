"""What a prediction looked at: a number for each measured cell, and the variables with the largest sums in words.

The logit that is explained is the model's own, before calibration, which changes its scale and not its order.
"""

from typing import Any

import numpy as np
import torch

from attnzoo.clinical.explain import CellMap, Finding, Logit, StayCells, attention, findings, integrated_gradients
from serve.clinical.intake import Intake
from serve.clinical.predictor import Predictor
from serve.workplace import Deadline

TITLES = {
    "gradients": "What the model's logit is made of, beside that of the same stay without any measurement",
    "attention": "Where the model's attention lies: what was looked at, not what it did to the prediction",
}


def explained(
    predictor: Predictor, intake: Intake, row: int, explain: str, logits_O: np.ndarray, deadline: Deadline
) -> dict[str, Any]:
    """One explanation of one patient. Raises ValueError where the map cannot be computed."""
    stay, model = predictor.stay(intake, row), predictor.trained.model
    output, words = _output(predictor, logits_O)

    def watched(*given: Any, **named: Any) -> torch.Tensor:
        deadline.check()
        out: torch.Tensor = model(*given, **named)
        return out

    logit = Logit(watched, output=output)
    with torch.no_grad():
        before = float(logit.without(stay, torch.ones_like(stay.observed))[0])
        found = integrated_gradients(logit, stay) if explain == "gradients" else attention(model, stay)
    hours, at = intake.patients[row].hours, "" if explain == "attention" else words
    evidence, name = predictor.trained.evidence, predictor.map_name(explain)
    verdict = None if evidence is None else evidence.maps.get(name)
    return {
        "name": name,
        "title": TITLES[explain],
        "signed": found.signed,
        "unit": "logit" if found.signed else "share",
        "explains": f"{at or predictor.outcome_words} at hour {hours}",
        "logit": float(logits_O[output]) if found.signed else None,
        "logit_without_measurements": before if found.signed else None,
        "faithful": None if verdict is None else verdict.beats_random,
        "faithfulness": (
            "Whether this map points at what the model uses was not measured for this model."
            if verdict is None
            else verdict.words
        ),
        "cells": _cells(predictor, stay, found),
        "findings": [_finding(one) for one in findings(found, stay, 0, tuple(predictor.needs.table))],
    }


def _output(predictor: Predictor, logits_O: np.ndarray) -> tuple[int, str]:
    """(the output that is explained, in words): of buckets that of the likeliest half."""
    outcome = predictor.trained.outcome
    if not outcome.edges:
        return 0, f"the logit of {predictor.outcome_words}"
    bucket = int(outcome.buckets(logits_O[None])[0])
    if outcome.ordinal:
        output = min(bucket, len(outcome.edges) - 1)
        return output, f"the logit of {predictor.outcome_words} above {outcome.edges[output]:g}"
    return bucket, f"the logit of bucket {bucket} of {predictor.outcome_words}"


def _cells(predictor: Predictor, stay: StayCells, found: CellMap) -> list[dict[str, Any]]:
    names = tuple(predictor.needs.table)
    return [
        {"hour": hour, "variable": names[variable], "contribution": float(found.values_NTV[0, hour, variable])}
        for _, hour, variable in stay.observed.nonzero().tolist()
    ]


def _finding(one: Finding) -> dict[str, Any]:
    return {
        "variable": one.variable,
        "amount": one.amount,
        "share": one.share,
        "hours": list(one.hours),
        "words": one.words,
    }
