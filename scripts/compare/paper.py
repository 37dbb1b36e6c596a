"""Compares the published accuracy and memory (arXiv 2308.03429) with measurements in the same setting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnzoo.models import DecoderLM
from attnzoo.report import Claim
from scripts.compare.comparison import Comparison
from scripts.compare.measure import MIB, measure_segments, segment_fault, standing_bytes
from scripts.compare.segments import Form
from scripts.compare.statistics import interval, mean_interval

PUBLISHED_ACCURACY = 0.572
PUBLISHED_GB = {"rcmha": 2.98, "rmha": 3.5}
TABLE = "paper's setting"
SAME = 1e-9
"""Largest difference of the same sums in float64 in another order; different functions differ by far more."""

Of = Callable[..., list[dict[str, Any]]]
"""Returns the results of (table, variant, form), one for each seed."""


@dataclass(frozen=True)
class PaperStep:
    """A training step in the paper's setting, with the published position table. standing_bytes: weights and optimizer
    state. fault: difference from the parallel form (`segment_fault`)."""

    ms: float
    peak_bytes: int
    standing_bytes: int
    parameters: int
    fault: float


def measure_paper(comparison: Comparison) -> dict[tuple[str, Form], PaperStep]:
    """Measures every variant and form of the paper's setting, with position tables of the published length."""
    config, paper = comparison.config, comparison.config.paper
    steps = {}
    for variant in config.variants:
        for form in comparison.forms(variant):
            decoder = comparison.decoder(variant, config.mlp_dim, paper.table_rows)
            ms, peak = measure_segments(decoder, paper.batch_size, paper.segment, paper.memory, form)
            fault = segment_fault(comparison.decoder(variant, config.mlp_dim, 32), paper.segment, form)
            parameters = DecoderLM(decoder).num_parameters()
            steps[variant, form] = PaperStep(ms, peak, standing_bytes(decoder), parameters, fault)
    return steps


def paper_rows(comparison: Comparison, of: Of, measured: dict[tuple[str, Form], PaperStep]) -> list[dict[str, Any]]:
    """Rows for the paper's setting, in the published form and with the carried convolution."""
    rows = []
    for (variant, form), step in measured.items():
        runs = of("paper", variant, form)
        rows.append(
            {
                "table": TABLE,
                "variant": variant,
                "query convolution": "none" if len(comparison.forms(variant)) == 1 else form,
                "accuracy as published": interval(r["mixed_accuracy"] for r in runs),
                "validation accuracy": interval(r["accuracy"] for r in runs),
                "bits per character": interval(r["bits_per_character"] for r in runs),
                "seeds": len(runs),
                "steps": comparison.config.paper.steps,
                "epochs": runs[0]["epochs"],
                "parameters": step.parameters,
                "peak MiB/step": step.peak_bytes / MIB,
                "weights and Adam MiB": step.standing_bytes / MIB,
                "train ms/step": step.ms,
                "off the parallel form": f"{step.fault:.1e}",
            }
        )
    return rows


def beside_the_paper(
    comparison: Comparison, of: Of, measured: dict[tuple[str, Form], PaperStep]
) -> list[dict[str, Any]]:
    """Rows with the paper's number, the measured number, and why they differ."""
    rows = []
    paper = comparison.config.paper
    if "rcmha" in comparison.config.variants:
        mixed = _mean(of("paper", "rcmha", "published"), "mixed_accuracy")
        honest = _mean(of("paper", "rcmha", "published"), "accuracy")
        share = paper.steps * paper.batch_size * paper.segment
        why = (
            f"counted over training and validation batches from the first step on, never reset; {paper.steps:,} steps "
            f"({share:,} characters) here against 10 epochs there; their script builds RMHA"
        )
        rows.append(_beside("RCMHA accuracy, counted as published", PUBLISHED_ACCURACY, f"{mixed:.3f}", why))
        why = "the validation part alone, after training; it holds no progress of the training in it"
        rows.append(_beside("RCMHA validation accuracy, same run", PUBLISHED_ACCURACY, f"{honest:.3f}", why))
        table = next((t for t in ("parameters", "flops") if t in comparison.config.tables), None)
        if table is not None:
            best = interval(r["accuracy"] for r in of(table, "rcmha"))
            why = f"segments of {comparison.config.segment}, nothing lost inside them, other optimizer and batch"
            rows.append(_beside("RCMHA validation accuracy, honest setting", PUBLISHED_ACCURACY, best, why))
    for variant, published in PUBLISHED_GB.items():
        step = measured.get((variant, "published"))
        if step is not None:
            total = (step.peak_bytes + step.standing_bytes) / 2**30
            why = (
                "the peak of a training step, weights and Adam's moments, float32, on a CPU; theirs is a GPU's, "
                "and how it was taken could not be checked: a process's total also holds its context and cached blocks"
            )
            rows.append(_beside(f"{variant.upper()} memory, GB", published, f"{total:.3f}", why))
    return rows


def paper_claims(comparison: Comparison, measured: dict[tuple[str, Form], PaperStep]) -> list[Claim]:
    """The published form differs from the parallel form, the carried one does not; RCMHA takes no less memory than
    RMHA."""
    claims = []
    for (variant, form), step in measured.items():
        if form == "carried":
            name = f"{variant}: segments with a carried convolution equal the parallel form"
            claims.append(Claim(name=name, expected=0.0, measured=step.fault, tolerance=SAME, kind="equal"))
        elif len(comparison.forms(variant)) == 2:
            name = f"{variant}: segments as published are another function"
            claims.append(Claim(name=name, expected=1e3 * SAME, measured=step.fault, kind="at_least"))
    rmha, rcmha = measured.get(("rmha", "published")), measured.get(("rcmha", "published"))
    if rmha is not None and rcmha is not None:
        name = "RCMHA's peak MiB at least RMHA's in the paper's setting"
        expected, got = rmha.peak_bytes / MIB, rcmha.peak_bytes / MIB
        claims.append(Claim(name=name, expected=expected, measured=got, kind="at_least"))
    return claims


def _mean(results: list[dict[str, Any]], key: str) -> float:
    return mean_interval([r[key] for r in results])[0]


def _beside(what: str, published: float, measured: str, why: str) -> dict[str, Any]:
    return {"table": "beside the paper", "what": what, "paper": published, "measured": measured, "why": why}
