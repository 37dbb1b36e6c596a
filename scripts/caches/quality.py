"""Measures retrieval and fidelity of every policy at every budget of bytes that it can meet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnzoo.models import DecoderLM
from scripts.caches.budget import Fit, fit_budget
from scripts.caches.metrics import Fidelity, FidelityMeter
from scripts.caches.policies import FULL, Contender
from scripts.caches.protocol import fidelity, forced_logits, prefill
from scripts.caches.retrieval import Batches, Score, ask_all

MARGIN = 0.02
"""Fraction of a budget that stays unused, so that other prompts meet it too."""
Entry = tuple[Contender, float, Fit]
"""A contender, its budget, and the ratio that meets it."""
TEXTS_AT_ONCE = 4
"""Texts of a batch; two sets of their logits are held at once."""

Tick = Callable[[int, str], None]
"""Called with the number of finished examples and a label."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The score of a contender at a budget, a fraction of the full cache's bytes (1.0: the full cache)."""

    contender: Contender
    budget: float
    fit: Fit
    score: Score


@dataclass(frozen=True)
class Measurements:
    """What to measure. entries: contenders with the budgets that they meet; skipped: (name, budget) of the others."""

    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, float], ...]


def longest_prompt(batches: Batches) -> Tensor:
    """tokens_1T of the longest context with its first question."""
    examples = [example for groups in batches.values() for group in groups for example in group]
    prompts = [example.body + example.questions[0].prompt for example in examples]
    return torch.tensor([max(prompts, key=len)])


def plan(
    model: DecoderLM, prompt_1T: Tensor, wanted: Sequence[tuple[Contender, Sequence[float]]], chunk: int, tick: Tick
) -> Measurements:
    """Finds every contender's ratio for every budget, by measuring states of this prompt.

    `MARGIN` of the budget stays unused, because a layer's share depends on the prompt and slots come in pages.
    """

    def measured(contender: Contender, ratio: float) -> int:
        return prefill(model, prompt_1T, contender.build(ratio), chunk=chunk).nbytes

    full = measured(FULL, 1.0)
    entries: list[Entry] = [(FULL, 1.0, Fit(1.0, full))]
    skipped = []
    for contender, budgets in wanted:
        for budget in budgets:
            tick(1, f"bytes of {contender.name} at {budget:.0%}")
            fit = fit_budget(partial(measured, contender), int((1 - MARGIN) * budget * full))
            if fit is None:
                skipped.append((contender.name, budget))
            else:
                entries.append((contender, budget, fit))
    return Measurements(tuple(entries), tuple(skipped))


def measure(model: DecoderLM, batches: Batches, entries: Sequence[Entry], chunk: int, tick: Tick) -> list[Result]:
    """Scores every entry on the same examples."""
    results = []
    for contender, budget, fit in entries:
        label = f"{contender.name} at {budget:.0%}"
        found = ask_all(model, batches, contender.build(fit.ratio), chunk, partial(_labelled, tick, label))
        results.append(Result(contender=contender, budget=budget, fit=fit, score=found))
    return results


def _labelled(tick: Tick, label: str, done: int) -> None:
    tick(done, label)


def measure_fidelity(
    model: DecoderLM, texts_NT: Tensor, prompt: int, entries: Sequence[Entry], tick: Tick
) -> dict[tuple[str, float], Fidelity]:
    """The fidelity of every entry by (contender, budget), after a prompt of `prompt` tokens of each text."""
    meters = {(contender.name, budget): FidelityMeter() for contender, budget, _ in entries}
    for tokens_BT in texts_NT.split(TEXTS_AT_ONCE):
        full_BTV = forced_logits(model, tokens_BT, prompt, FULL.build())
        for contender, budget, fit in entries:
            policy = contender.build(fit.ratio)
            fidelity(model, tokens_BT, prompt, policy, full_BTV, meters[contender.name, budget])
            tick(len(tokens_BT), f"fidelity of {contender.name} at {budget:.0%}")
    return {key: meter.result() for key, meter in meters.items()}
