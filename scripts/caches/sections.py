"""The sections of the benchmark; each adds its rows and claims to the report."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderLM
from attnzoo.planner.chips import chosen_chips
from attnzoo.progress import Progress
from attnzoo.report import Report
from attnzoo.tasks.symbols import symbol_example, symbol_tokens
from attnzoo.tasks.text import text_example
from scripts.caches import table
from scripts.caches.metrics import FidelityMeter
from scripts.caches.models import TextModel, prose
from scripts.caches.peer import Exchange, peer_logits, run_peer
from scripts.caches.peer_scores import compare_scores
from scripts.caches.policies import CHANNELS, FULL, PARTS, TOKENS, Contender
from scripts.caches.protocol import forced_logits
from scripts.caches.quality import Measurements, Result, longest_prompt, measure, measure_fidelity, plan
from scripts.caches.retrieval import Batches, Maker, ask_all, keep_answered, make_batches, solved_tasks
from scripts.caches.roofline import step_cost
from scripts.caches.settings import QualitySizes, Settings
from scripts.caches.speed import Speed, measure_speed

SPEED_POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "d2o": ("d2o", {"keep_ratio": 0.2, "min_tokens": 0, "prefill": "stream"}),
    "think": ("think", {"channel_ratio": 0.5}),
    "d2o+think": ("d2o+think", {"keep_ratio": 0.2, "min_tokens": 0, "channel_ratio": 0.5, "prefill": "stream"}),
}
"""Policies for the speed of decoding: D2O with 20 % of the tokens, ThinK with 50 % of the channels, both."""
ROOFLINE_CHIPS = ["H100", "MI300X"]


def symbols(text_model: TextModel, settings: Settings, report: Report) -> None:
    """Retrieval over symbols, with the small model that is trained on it. Raises ValueError if it solves no task."""
    tokens, sizes = symbol_tokens(text_model.encode), settings.symbols

    def make(task: str, seed: int) -> Any:
        return symbol_example(task, sizes.context, seed).translated(tokens).after(text_model.begin)

    drawn = _drawn(make, sizes, settings.seeds)
    batches = _solved("symbols", text_model.model, drawn, sizes, report)
    if not batches:
        raise ValueError(f"symbols: the full cache solves none of {', '.join(sizes.tasks)}; use another model")
    results = _quality(
        "symbols", text_model.model, batches, _planned("symbols", text_model.model, drawn, sizes), sizes, report
    )
    if not report.quick:
        report.claims.append(table.solved_claim("symbols", results[0], sizes.tasks, sizes.least))


def text(text_model: TextModel, settings: Settings, report: Report, peer: Exchange | None) -> None:
    """Fidelity on prose and retrieval in English with a real checkpoint, and, with `peer`, the same with kvpress. For a
    checkpoint that solves no task only fidelity is measured."""
    sizes = settings.text

    def make(task: str, seed: int) -> Any:
        return text_example(text_model.encode, task, sizes.context, seed).after(text_model.begin)

    drawn = _drawn(make, sizes, settings.seeds)
    found = _planned("text", text_model.model, drawn, sizes)
    report.rows += _fidelity_rows("fidelity", text_model, settings, found)
    batches = _solved("text", text_model.model, drawn, sizes, report)
    results = _quality("text", text_model.model, batches, found, sizes, report) if batches else []
    if peer is not None:
        peer.export(text_model.model)
        _peer_scores(longest_prompt(drawn), report, peer)
        _peer_fidelity(text_model, settings, report, peer)
        if batches:
            _peer_quality(batches, results, sizes, report, peer)


def parts(text_model: TextModel, settings: Settings, report: Report) -> None:
    """The effect of each part of D2O on fidelity, with the budgets, prompts and texts of the section text."""
    sizes = settings.text
    prompt_1T = prose(text_model.encode, 1, settings.fidelity.prompt)
    wanted: list[tuple[Contender, Sequence[float]]] = [(contender, sizes.token_budgets) for contender in PARTS]
    found = _plan("parts", text_model.model, prompt_1T, wanted, sizes.chunk)
    rows = _fidelity_rows("parts", text_model, settings, found)
    report.rows += rows
    if not report.quick:
        report.claims += table.parts_claims("parts", rows)


def _drawn(make: Maker, sizes: QualitySizes, seeds: int) -> Batches:
    """All examples for the full cache."""
    return make_batches(make, sizes.tasks, seeds, sizes.drawn or sizes.count, sizes.batch)


def _planned(name: str, model: DecoderLM, batches: Batches, sizes: QualitySizes) -> Measurements:
    """All contenders at all budgets that they can meet; prints those that they cannot meet."""
    wanted: list[tuple[Contender, Sequence[float]]] = [(c.observing(sizes.window), sizes.token_budgets) for c in TOKENS]
    wanted += [(c.observing(sizes.window), sizes.channel_budgets) for c in CHANNELS]
    return _plan(name, model, longest_prompt(batches), wanted, sizes.chunk)


def _plan(
    name: str, model: DecoderLM, prompt_1T: Tensor, wanted: Sequence[tuple[Contender, Sequence[float]]], chunk: int
) -> Measurements:
    progress = Progress(sum(len(budgets) for _, budgets in wanted))
    found = plan(model, prompt_1T, wanted, chunk, progress.add)
    progress.close()
    for contender, budget in found.skipped:
        print(f"{name}: {contender} cannot get down to {budget:.0%} of the full cache's bytes", file=sys.stderr)
    return found


def _quality(
    name: str, model: DecoderLM, batches: Batches, found: Measurements, sizes: QualitySizes, report: Report
) -> list[Result]:
    """Measures the planned entries on the tasks and examples that the full cache solves."""
    tasks = list(dict.fromkeys(task for task, _ in batches))
    seeds = 1 + max(seed for _, seed in batches)
    progress = Progress(seeds * sizes.count * len(tasks) * len(found.entries))
    results = measure(model, batches, found.entries, sizes.chunk, progress.add)
    progress.close()
    report.rows += [table.quality_row(name, result, tasks) for result in results]
    report.rows += [row for result in results for row in table.seed_rows(f"{name} by seed", result, tasks, seeds)]
    report.claims += table.byte_budget_claims(name, results)
    if not report.quick:
        report.claims += table.quality_claims(name, results, tasks)
    return results


def _solved(name: str, model: DecoderLM, batches: Batches, sizes: QualitySizes, report: Report) -> Batches:
    """The batches of solved tasks or, with `sizes.drawn`, of solved examples; may be empty. Also reports the full
    cache's accuracy on all."""
    progress = Progress(sum(len(examples) for groups in batches.values() for examples in groups))
    score = ask_all(model, batches, FULL.build(), sizes.chunk, lambda done: progress.add(done, f"{name}: full cache"))
    progress.close()
    accuracy = {task: round(score.accuracy(task), 4) for task in sizes.tasks}
    report.rows.append({"table": f"{name}: full cache", "examples": sizes.drawn or sizes.count, **accuracy})
    if sizes.drawn is None:
        solved = solved_tasks(score, sizes.tasks, sizes.least)
        kept = {key: groups for key, groups in batches.items() if key[0] in solved}
    else:
        kept = keep_answered(batches, score, sizes.count, sizes.batch)
    left_out = [task for task in sizes.tasks if not any(task == key[0] for key in kept)]
    if left_out:
        print(f"{name}: left out, as the full cache does not solve them: {', '.join(left_out)}", file=sys.stderr)
    return kept


def _fidelity_rows(name: str, text_model: TextModel, settings: Settings, found: Measurements) -> list[dict[str, Any]]:
    """Rows with KL, agreement and perplexity of the tokens after a compressed prompt of prose."""
    sizes = settings.fidelity
    texts_NT = prose(text_model.encode, sizes.texts, sizes.prompt + sizes.forced + 1)
    progress = Progress(len(texts_NT) * len(found.entries))
    values = measure_fidelity(text_model.model, texts_NT, sizes.prompt, found.entries, progress.add)
    progress.close()
    return [table.fidelity_row(name, policy, budget, value) for (policy, budget), value in values.items()]


def _peer_scores(prompt_1T: Tensor, report: Report, peer: Exchange) -> None:
    """Compares scores of channels and tokens with kvpress's, on its queries and keys of a prompt."""
    found = compare_scores(peer, prompt_1T)
    report.rows.append(table.agreement_row("kvpress: scores of the same queries and keys", found))
    report.claims += table.agreement_claims("kvpress", found)


def _peer_quality(
    batches: Batches, results: Sequence[Result], sizes: QualitySizes, report: Report, peer: Exchange
) -> None:
    """Adds kvpress's answers at the budgets of the token policies."""
    tasks = list(dict.fromkeys(task for task, _ in batches))
    full = results[0]
    for budget in sizes.token_budgets:
        scores = run_peer(peer, batches, budget)
        for press, score in scores.items():
            contender = Contender(name=press, policy=press, knob=None, role="control")
            result = replace(full, contender=contender, budget=budget, fit=replace(full.fit, ratio=budget), score=score)
            report.rows.append(table.quality_row("text", result, tasks))
        best = max(scores, key=lambda press: scores[press].accuracy())
        mine = next(r for r in results if r.contender.name == table.D2O and r.budget == budget)
        name = f"text, {budget:.0%} of the bytes"
        report.claims.append(table.peer_claim(name, mine.score.accuracy(), best, scores[best].accuracy()))


def _peer_fidelity(text_model: TextModel, settings: Settings, report: Report, peer: Exchange) -> None:
    """Adds the fidelity of kvpress on the same prose, relative to attnzoo's full cache."""
    sizes = settings.fidelity
    texts_NT = prose(text_model.encode, sizes.texts, sizes.prompt + sizes.forced + 1)
    full_NTV = forced_logits(text_model.model, texts_NT, sizes.prompt, FULL.build())
    for budget in settings.text.token_budgets:
        for press, logits_NTV in peer_logits(peer, texts_NT, sizes.prompt, budget).items():
            meter = FidelityMeter()
            meter.add(full_NTV, logits_NTV, texts_NT[:, sizes.prompt + 1 :])
            report.rows.append(table.fidelity_row("fidelity", press, budget, meter.result()))


def speed(model: DecoderLM, settings: Settings, report: Report) -> dict[str, Speed]:
    """Measures decoding with a long context; returns the speeds with the smallest number of sequences, by policy."""
    policies = {name: build_cache(kind, options) for name, (kind, options) in SPEED_POLICIES.items()}
    found = measure_speed(model, policies, settings.speed, lambda line: print(f"decode: {line}", file=sys.stderr))
    for batch, speeds in found.items():
        report.rows += table.speed_rows(speeds)
        if not report.quick:
            report.claims += table.speed_claims(f"decode, {batch} sequences", speeds)
    least = found[min(found)]
    if not report.quick:
        report.claims += table.memory_claims(least)
    return least


def roofline(model: DecoderLM, speeds: dict[str, Speed], report: Report) -> None:
    """Adds estimates for other chips from the bytes and FLOPs of the measured states."""
    weights = model.num_parameters(embeddings=False) + model.head.weight.numel()
    costs = {
        name: step_cost(
            weight_bytes=speed.weight_bytes,
            weights=weights,
            attention=speed.attention,
            batch=speed.batch,
        )
        for name, speed in speeds.items()
    }
    for chip in chosen_chips(ROOFLINE_CHIPS):
        for name, cost in costs.items():
            report.rows.append(
                {
                    "table": "roofline (a model, not a measurement)",
                    "chip": chip.name,
                    "policy": name,
                    "MB/step": round(cost.nbytes / 1e6, 1),
                    "GFLOP/step": round(cost.flops / 1e9, 2),
                    "us/step": round(1e6 * cost.seconds(chip), 1),
                    "times full": round(costs[FULL.name].seconds(chip) / cost.seconds(chip), 2),
                }
            )
