"""The rows and claims about cache policies."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from attnzoo.report import Claim
from scripts.caches.metrics import Fidelity
from scripts.caches.peer_scores import Agreement
from scripts.caches.protocol import CONDITIONS
from scripts.caches.quality import Result
from scripts.caches.speed import Speed

D2O, CONTROLS = "d2o", ("streaming", "random_tokens")
THINK, RANDOM_CHANNELS = "think", "random_channels"


def quality_row(table: str, result: Result, tasks: Sequence[str]) -> dict[str, Any]:
    """A row with bytes, accuracy by task (over all conditions) and accuracy by condition (over all tasks)."""
    score = result.score
    return {
        "table": table,
        "policy": result.contender.name,
        "budget": result.budget,
        "ratio": round(result.fit.ratio, 4),
        "bytes": score.nbytes,
        **({"peak bytes": score.peak_nbytes} if score.peak_nbytes else {}),
        **{task: round(score.accuracy(task), 4) for task in tasks},
        **{where: round(score.accuracy(condition=where), 4) for where in CONDITIONS},
        "mean": round(score.accuracy(), 4),
        **({"tokens/s": round(score.tokens / score.seconds, 1)} if score.seconds else {}),
    }


def fidelity_row(table: str, policy: str, budget: float, fidelity: Fidelity) -> dict[str, Any]:
    """A row with the fidelity of a policy."""
    return {
        "table": table,
        "policy": policy,
        "budget": budget,
        "KL mean": round(fidelity.kl_mean, 5),
        "KL p99": round(fidelity.kl_p99, 4),
        "top-1 agreement": round(fidelity.agreement, 4),
        "perplexity": round(fidelity.perplexity, 3),
    }


def seed_rows(table: str, result: Result, tasks: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Rows with the accuracy of every task, condition and seed."""
    return [
        {
            "table": table,
            "policy": result.contender.name,
            "budget": result.budget,
            "task": task,
            "condition": where,
            "seed": seed,
            "accuracy": round(result.score.accuracy(task, where, seed), 4),
        }
        for task in tasks
        for where in CONDITIONS
        for seed in range(seeds)
    ]


def quality_claims(table: str, results: Sequence[Result], tasks: Sequence[str]) -> list[Claim]:
    """D2O against the controls of equal size on every task, and ThinK against random channels."""
    found = {(r.contender.name, r.budget): r for r in results}
    claims = []
    for budget in sorted({r.budget for r in results}, reverse=True):
        controls = [found[name, budget] for name in CONTROLS if (name, budget) in found]
        if (D2O, budget) in found and controls:
            for task in tasks:
                best = max(control.score.accuracy(task) for control in controls)
                mine = found[D2O, budget].score.accuracy(task)
                claims.append(
                    _at_least(f"{table}, {budget:.0%} of the bytes, {task}: d2o against controls", best, mine)
                )
        if (THINK, budget) in found and (RANDOM_CHANNELS, budget) in found:
            random = found[RANDOM_CHANNELS, budget].score.accuracy()
            mine = found[THINK, budget].score.accuracy()
            claims.append(_at_least(f"{table}, {budget:.0%}: think against random channels", random, mine))
    return claims


def parts_claims(table: str, rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """D2O is nearer to the full cache than D2O without one of its parts. rows: of `fidelity_row`."""
    found = {(row["policy"], row["budget"]): row["KL mean"] for row in rows}
    budgets = sorted({budget for policy, budget in found if policy == D2O}, reverse=True)
    without = dict.fromkeys(policy for policy, _ in found if policy.startswith(f"{D2O}, "))
    return [
        Claim(
            name=f"{table}, {budget:.0%} of the bytes: KL of d2o against {policy}",
            expected=found[policy, budget],
            measured=found[D2O, budget],
        )
        for budget in budgets
        for policy in without
    ]


def solved_claim(table: str, full: Result, tasks: Sequence[str], least: float) -> Claim:
    """The model solves every task with the full cache."""
    answered = {task for task, _, _ in full.score.right}
    return _at_least(f"{table}: tasks that the full cache solves to {least:.0%}", len(tasks), len(answered))


def byte_budget_claims(table: str, results: Sequence[Result]) -> list[Claim]:
    """No policy exceeds its budget for any example."""
    full = next(result for result in results if result.budget == 1.0).score.nbytes
    used = [r.score.nbytes / (r.budget * full) for r in results if r.budget < 1.0]
    return [Claim(name=f"{table}: bytes over the budget, the most of all policies", expected=1.0, measured=max(used))]


def speed_rows(speeds: dict[str, Speed]) -> list[dict[str, Any]]:
    """Rows with tokens per second, bytes, and the speed-up that reading fewer bytes allows."""
    full = speeds["full"]
    return [
        {
            "table": "decode",
            "policy": name,
            "sequences": speed.batch,
            "dtype": speed.dtype,
            "tokens/s": round(speed.tokens_per_second, 2),
            "ms/step": round(1000 * speed.step_seconds, 1),
            "not compiled": "" if speed.operator_seconds is None else round(1000 * speed.operator_seconds, 1),
            **{f"ms {part}": round(1000 * took, 1) for part, took in asdict(speed.parts).items()},
            "GB/s": round(speed.read_rate / 1e9, 2),
            "state bytes": speed.state_bytes,
            "peak bytes": speed.peak_bytes,
            "times full": round(full.step_seconds / speed.step_seconds, 3),
            "allowed by bytes": round(full.read_bytes / speed.read_bytes, 3),
            "fit full's memory": speed.sequences_in(full.batch * full.peak_bytes),
        }
        for name, speed in speeds.items()
    ]


def speed_claims(name: str, speeds: dict[str, Speed]) -> list[Claim]:
    """Throughput relative to the full cache with the same number of sequences."""
    full = speeds["full"]
    best = max(speed.read_rate for speed in speeds.values())
    claims = [
        # A slow baseline would favour every policy, so the full cache must read nearly as fast as the best.
        _at_least(f"{name}: full cache's bytes/s over the best policy's", 0.75, full.read_rate / best)
    ]
    if "d2o" in speeds:
        ratio = full.step_seconds / speeds["d2o"].step_seconds
        allowed = full.read_bytes / speeds["d2o"].read_bytes
        claims += [
            _at_least(
                f"{name}: full cache's bytes over the weights'", 10.0, full.batch * full.state_bytes / full.weight_bytes
            ),
            _at_least(f"{name}: d2o, times the full cache's tokens/s", 3.0, ratio),
            _at_least(f"{name}: d2o, share of the {allowed:.2f} times that its bytes allow", 0.75, ratio / allowed),
        ]
    if "think" in speeds:
        ratio = full.step_seconds / speeds["think"].step_seconds
        claims.append(_at_least(f"{name}: think, times the full cache's tokens/s", 1.0, ratio))
    return claims


def memory_claims(speeds: dict[str, Speed]) -> list[Claim]:
    """Bytes of a sequence, and sequences that fit in the memory that the full cache takes for the batch."""
    full = speeds["full"]
    claims = byte_claims({name: speed.state_bytes / full.state_bytes for name, speed in speeds.items()})
    if "d2o" in speeds:
        memory = full.batch * full.peak_bytes
        times = speeds["d2o"].sequences_in(memory) / full.sequences_in(memory)
        claims.append(_at_least("d2o: sequences in the memory of the full cache's, prefill peak counted", 4.0, times))
    return claims


def byte_claims(shares: dict[str, float]) -> list[Claim]:
    """The claims about saved bytes. shares: bytes of each policy relative to the full cache."""
    wanted = {"think": 0.24, "d2o+think": 0.84}
    return [
        _at_least(f"{name}: share of the full cache's bytes that is gone", least, 1 - shares[name])
        for name, least in wanted.items()
        if name in shares
    ]


def peer_claim(table: str, ours: float, press: str, theirs: float) -> Claim:
    """D2O's mean accuracy against that of kvpress's best press, at equal bytes."""
    return _at_least(f"{table}: d2o against kvpress's {press}, mean", theirs, ours)


def agreement_row(table: str, found: Agreement) -> dict[str, Any]:
    """A row with the agreement of scores."""
    return {
        "table": table,
        "channels": found.channels,
        "at the same rank": found.same_rank,
        "tokens": found.tokens,
        "largest difference": float(f"{found.difference:.3g}"),
    }


def agreement_claims(name: str, found: Agreement) -> list[Claim]:
    """ThinK ranks every channel as ThinKPress does; SnapKV's scores differ only by rounding in float32."""
    share = found.same_rank / found.channels
    return [
        Claim(name=f"{name}: channels that think ranks as ThinKPress", expected=1.0, measured=share, kind="equal"),
        Claim(
            name=f"{name}: snapkv's scores and SnapKVPress's, the largest difference over the largest score",
            expected=1e-5,
            measured=float(f"{found.difference:.3g}"),
        ),
    ]


def _at_least(name: str, expected: float, measured: float) -> Claim:
    return Claim(name=name, expected=round(expected, 4), measured=round(measured, 4), kind="at_least")
