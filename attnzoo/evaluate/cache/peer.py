"""kvpress beside us: the same exported weights, the same tokens, the same bytes, in a Python of its own."""

import json
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnzoo.checkpoint import export_model
from attnzoo.evaluate.cache.examples import Example
from attnzoo.evaluate.cache.retrieval import Batches, Score
from attnzoo.models import DecoderLM

PRESSES = ("SnapKVPress", "ObservedAttentionPress", "TOVAPress", "ExpectedAttentionPress", "KnormPress")
"""Presses that choose tokens by what they see in the prompt: what D2O is compared with. ObservedAttention is H2O's
accumulated attention."""


@dataclass(frozen=True)
class PeerError(Exception):
    """The other Python could not run; the message says what it said last."""

    message: str

    def __str__(self) -> str:
        return self.message


def work_items(examples: list[Example]) -> list[dict[str, Any]]:
    """Two prompts an example: with the first question inside (the second one follows), and with it outside."""
    items = []
    for example in examples:
        first, second = example.questions[:2]
        inside = [*first.lead, *first.answer]
        both = [*inside, *second.tokens]
        spans = [[len(first.lead), len(inside)], [len(both) - len(second.answer), len(both)]]
        items.append({"prompt": [*example.body, *first.prompt], "forced": both, "spans": spans})
        span = [len(first.tokens) - len(first.answer), len(first.tokens)]
        items.append({"prompt": list(example.body), "forced": list(first.tokens), "spans": [span]})
    return items


def run_peer(
    python: Path, script: Path, model: DecoderLM, batches: Batches, budget: float, directory: Path
) -> dict[str, Score]:
    """Scores by press at a `budget`, the share of the full cache's bytes, which for kvpress is that of its tokens.

    Writes the exported model and the files of the exchange to `directory`. Raises PeerError when the other Python
    cannot run kvpress.
    """
    exported = directory / "model"
    export_model(exported, model)
    keys, items = [], []
    for (task, seed), groups in batches.items():
        for example in (example for group in groups for example in group):
            items += work_items([example])
            keys.append((task, seed))
    work, result = directory / "work.json", directory / "result.json"
    work.write_text(
        json.dumps({"model": str(exported), "ratio": 1 - budget, "presses": PRESSES, "items": items}), encoding="utf-8"
    )
    try:
        done = subprocess.run([str(python), str(script), str(work), str(result)], stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise PeerError(f"{python} cannot be run ({error}); give the Python of an environment with kvpress") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PeerError(f"kvpress under {python} failed: {last[0]}")
    return {press: _score(found, keys) for press, found in json.loads(result.read_text(encoding="utf-8")).items()}


def _score(found: dict[str, Any], keys: list[tuple[str, int]]) -> Score:
    right: dict[tuple[str, str, int], list[bool]] = defaultdict(list)
    for number, (task, seed) in enumerate(keys):
        inside, second = found["right"][2 * number]
        (outside,) = found["right"][2 * number + 1]
        for where, value in (("inside", inside), ("second", second), ("outside", outside)):
            right[task, where, seed].append(value)
    most = max(found["nbytes"])
    return Score(right, nbytes=most, peak_nbytes=0)
