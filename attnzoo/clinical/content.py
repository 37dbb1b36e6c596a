"""Digests of what a cohort holds, by which a run's data are known again: not by their names alone, but by their values.

A digest depends on the values alone, not on the machine or on how arrays store them: numbers are hashed as float32 in
little-endian order, the precision in which models read them, with one zero and one NaN; beside them their shape.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnzoo.clinical.cohort import Cohort

BLOCK = 256
"""Rows that are converted at a time."""
LENGTH = 32
"""Hexadecimal digits of a digest."""


def content_digests(cohort: Cohort, labels: np.ndarray) -> dict[str, str]:
    """A digest of each part of a cohort, by the part's name. labels: [N, ...], as the run has them; labels that it does
    not predict do not count. Parts that the data set does not have are left out."""
    grid = cohort.grid
    found = {
        "measurements": _digest(
            {"variables": grid.variables, "step_hours": [grid.step_hours]},
            {"values": grid.values_NTV, "counts": grid.counts_NTV, "hours": grid.hours_N},
        ),
        "statics": _digest({"statics": cohort.statics}, {"values": cohort.statics_NS}),
        "labels": _digest({}, {"values": labels}),
    }
    if cohort.patient_ids is not None:
        found["patients"] = _digest({"patients": cohort.patient_ids}, {})
    if cohort.dates is not None:
        found["dates"] = _digest({"dates": np.datetime_as_string(cohort.dates, unit="D").tolist()}, {})
    if cohort.texts is not None:
        found["texts"] = _digest({"texts": cohort.texts}, {})
    return found


def data_digest(split: Mapping[str, Any]) -> str | None:
    """One digest of the stays and the values that an export's `split` names; of one of before, of the stays alone; None
    where it names neither."""
    stays, content = split.get("digest"), split.get("content")
    if stays is None or content is None:
        return stays
    return hashlib.sha256(json.dumps([stays, content], sort_keys=True).encode()).hexdigest()


def _digest(words: Mapping[str, Sequence[Any]], arrays: Mapping[str, np.ndarray]) -> str:
    whole = hashlib.sha256(json.dumps([[name, list(told)] for name, told in words.items()]).encode())
    for name, array in arrays.items():
        whole.update(f"\0{name} {array.shape}\0".encode())
        for start in range(0, len(array), BLOCK):
            block = array[start : start + BLOCK].astype("<f4") + np.float32(0.0)  # -0 becomes 0
            block[np.isnan(block)] = np.float32("nan")
            whole.update(np.ascontiguousarray(block, "<f4").tobytes())
    return whole.hexdigest()[:LENGTH]
