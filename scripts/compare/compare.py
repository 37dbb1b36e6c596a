"""Makes the runs and measurements of a comparison, and their rows and claims."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnzoo.report import Claim, Report
from scripts.compare.comparison import Comparison, Run
from scripts.compare.measure import Speed, measure
from scripts.compare.paper import beside_the_paper, measure_paper, paper_claims, paper_rows
from scripts.compare.statistics import interval
from scripts.compare.workers import run_all

TITLES = {"parameters": "matched parameters", "flops": "matched FLOPs"}
EQUAL = "equal shapes"


@dataclass(frozen=True)
class Results:
    """The contents of all runs, and speeds by (table, variant), for the tables in `TITLES` and for `EQUAL` shapes."""

    runs: list[tuple[Run, dict[str, Any]]]
    speeds: dict[tuple[str, str], Speed]

    def of(self, table: str, variant: str, form: str | None = None) -> list[dict[str, Any]]:
        """The results of all seeds for a table, a variant and (in the paper's setting) a form."""
        return [
            content["results"]
            for run, content in self.runs
            if (run.table, run.variant) == (table, variant) and form in (None, run.form)
        ]


def compare(comparison: Comparison, directory: Path, workers: int, report: Report) -> Results:
    """Makes or reads all runs, measures speed and memory, and adds rows and claims to the report."""
    runs = run_all(comparison, directory, workers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = Results(runs, measure_all(comparison))
    config = comparison.config
    for table in TITLES:
        if table in config.tables:
            report.rows += quality_rows(comparison, results, table)
            report.rows += cost_rows(comparison, results, table, f"{TITLES[table]}, cost")
            report.rows += extrapolation_rows(comparison, results, table)
            report.claims.append(_matched_claim(comparison, table))
    if "recall" in config.tables:
        report.rows += recall_rows(comparison, results)
        report.claims.append(_matched_claim(comparison, "recall"))
    report.rows += cost_rows(comparison, results, EQUAL, EQUAL)
    report.claims += _memory_claims(results)
    if "paper" in config.tables:
        measured = measure_paper(comparison)
        report.rows += paper_rows(comparison, results.of, measured)
        report.rows += beside_the_paper(comparison, results.of, measured)
        report.claims += paper_claims(comparison, measured)
    torch.set_num_threads(threads)
    return results


def measure_all(comparison: Comparison) -> dict[tuple[str, str], Speed]:
    """Speed and memory of each variant, with its matched widths and with equal shapes."""
    config = comparison.config
    speeds = {}
    for table in [*(table for table in TITLES if table in config.tables), EQUAL]:
        for variant in config.variants:
            width = config.mlp_dim if table == EQUAL else comparison.matches(table)[variant].mlp_dim
            decoder = comparison.decoder(variant, width, config.segment)
            speeds[table, variant] = measure(decoder, config.batch_size, config.segment)
    return speeds


def quality_rows(comparison: Comparison, results: Results, table: str) -> list[dict[str, Any]]:
    """Rows with quality (confidence intervals over seeds) and the matched quantities."""
    rows = []
    for variant in comparison.config.variants:
        runs, match = results.of(table, variant), comparison.matches(table)[variant]
        rows.append(
            {
                "table": TITLES[table],
                "variant": variant,
                "bits per character": interval(r["bits_per_character"] for r in runs),
                "validation accuracy": interval(r["accuracy"] for r in runs),
                "parameters": match.parameters,
                "train MFLOP/token": match.train_flops_per_token / 1e6,
                "off target": f"{match.deviation:+.2%}",
                "mlp_dim": match.mlp_dim,
                "seeds": len(runs),
                "epochs": runs[0]["epochs"],
            }
        )
    return rows


def cost_rows(comparison: Comparison, results: Results, table: str, title: str) -> list[dict[str, Any]]:
    """Rows with speed and memory of training steps, and of decoding with a context of `segment` tokens."""
    rows = []
    for variant in comparison.config.variants:
        speed = results.speeds[table, variant]
        rows.append(
            {
                "table": title,
                "variant": variant,
                "train ms/step": speed.train_ms,
                "peak MiB/step": speed.peak_bytes / 2**20,
                "decode us/token": speed.decode_us,
                "state bytes/token": speed.state_bytes_per_token,
                "constant state bytes": speed.state_bytes - comparison.config.segment * speed.state_bytes_per_token,
            }
        )
    return rows


def extrapolation_rows(comparison: Comparison, results: Results, table: str) -> list[dict[str, Any]]:
    """Rows with nats per character in windows of 1, 2 and 4 trained lengths, and in their last `segment` positions."""
    rows = []
    for variant in comparison.config.variants:
        runs = results.of(table, variant)
        row: dict[str, Any] = {"table": f"{TITLES[table]}, longer windows", "variant": variant}
        for times in (1, 2, 4):
            row[f"loss {times}x"] = interval(r[f"loss_{times}x"] for r in runs)
        for times in (2, 4):
            row[f"last quarter {times}x" if times == 4 else "last half 2x"] = interval(
                r[f"last_{times}x"] for r in runs
            )
        rows.append(row)
    return rows


def recall_rows(comparison: Comparison, results: Results) -> list[dict[str, Any]]:
    """Rows with the accuracy of associative recall."""
    rows = []
    for variant in comparison.config.variants:
        runs, match = results.of("recall", variant), comparison.matches("recall")[variant]
        rows.append(
            {
                "table": "recall",
                "variant": variant,
                "accuracy": interval(r["accuracy"] for r in runs),
                "chance": 2 / comparison.config.recall.vocab_size,
                "steps": comparison.config.recall.steps,
                "parameters": match.parameters,
                "off target": f"{match.deviation:+.2%}",
                "seeds": len(runs),
            }
        )
    return rows


def _matched_claim(comparison: Comparison, table: str) -> Claim:
    kind = "FLOPs" if table == "flops" else "parameters"
    place = " (recall)" if table == "recall" else ""
    worst = max(abs(match.deviation) for match in comparison.matches(table).values())
    return Claim(
        name=f"{kind} of all variants{place} agree", expected=0.0, measured=worst, tolerance=0.01, kind="equal"
    )


def _memory_claims(results: Results) -> list[Claim]:
    equal = {variant: speed for (table, variant), speed in results.speeds.items() if table == EQUAL}
    claims = [
        Claim(
            name=f"state bytes of {variant} as the cost says",
            expected=float(speed.state_bytes_said),
            measured=float(speed.state_bytes),
            kind="equal",
        )
        for variant, speed in equal.items()
    ]
    if {"rmha", "rcmha"} <= equal.keys():
        claims.append(
            Claim(
                name="RCMHA's peak MiB at least RMHA's at equal shapes",
                expected=equal["rmha"].peak_bytes / 2**20,
                measured=equal["rcmha"].peak_bytes / 2**20,
                kind="at_least",
            )
        )
    return claims
