"""Measures kvpress in another Python environment, with the same weights, tokens and bytes."""

import json
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from attnzoo.checkpoint import export_model
from attnzoo.models import DecoderLM
from attnzoo.tasks.examples import Example
from scripts.caches.retrieval import Batches, Score

PRESSES = ("SnapKVPress", "ObservedAttentionPress", "TOVAPress", "ExpectedAttentionPress", "KnormPress")
"""Presses that choose tokens by the prompt, with which D2O is compared. ObservedAttention is H2O's accumulated
attention."""


@dataclass(frozen=True)
class PeerError(Exception):
    """kvpress could not be run; the message has its last line of output."""

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Exchange:
    """The Python of kvpress's environment, the script to run, and a directory for the exported model and the files."""

    python: Path
    script: Path
    directory: Path

    def export(self, model: DecoderLM) -> None:
        """Exports the model for kvpress."""
        export_model(self.directory / "model", model)

    def run(self, work: dict[str, Any], result: Path) -> Path:
        """Runs `work` on the exported model; returns the path of the result. Raises PeerError if it fails."""
        told, result = self.directory / "work.json", self.directory / result
        told.write_text(json.dumps({"model": str(self.directory / "model"), **work}), encoding="utf-8")
        try:
            done = subprocess.run(
                [str(self.python), str(self.script), str(told), str(result)], stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise PeerError(
                f"{self.python} cannot be run ({error}); give the Python of an environment with kvpress"
            ) from None
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise PeerError(f"kvpress under {self.python} failed: {last[0]}")
        return result


def work_items(examples: list[Example]) -> list[dict[str, Any]]:
    """Two prompts for each example: with the first question inside the prompt (and the second after it), and with the
    first question after the prompt."""
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


def run_peer(exchange: Exchange, batches: Batches, budget: float) -> dict[str, Score]:
    """Scores by press. budget: fraction of the full cache's bytes, which for kvpress is the fraction of its tokens.

    Raises PeerError if kvpress cannot be run.
    """
    keys, items = [], []
    for (task, seed), groups in batches.items():
        for example in (example for group in groups for example in group):
            items += work_items([example])
            keys.append((task, seed))
    work = {"kind": "retrieval", "ratio": 1 - budget, "presses": PRESSES, "items": items}
    result = exchange.run(work, Path("result.json"))
    return {press: _score(found, keys) for press, found in json.loads(result.read_text(encoding="utf-8")).items()}


def peer_logits(exchange: Exchange, tokens_NT: Tensor, prompt: int, budget: float) -> dict[str, Tensor]:
    """logits_NTV by press, as those of `protocol.forced_logits`. Raises PeerError if kvpress cannot be run."""
    work = {
        "kind": "logits",
        "ratio": 1 - budget,
        "presses": PRESSES,
        "prompts": tokens_NT[:, :prompt].tolist(),
        "forced": tokens_NT[:, prompt:-1].tolist(),
    }
    path = exchange.run(work, Path("logits.safetensors"))
    found = load_file(path)
    path.unlink()
    return found


def _score(found: dict[str, Any], keys: list[tuple[str, int]]) -> Score:
    right: dict[tuple[str, str, int], list[bool]] = defaultdict(list)
    for number, (task, seed) in enumerate(keys):
        inside, second = found["right"][2 * number]
        (outside,) = found["right"][2 * number + 1]
        for where, value in (("inside", inside), ("second", second), ("outside", outside)):
            right[task, where, seed].append(value)
    most = max(found["nbytes"])
    return Score(right, nbytes=most, peak_nbytes=0)
