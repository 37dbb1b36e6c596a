"""Writes the golden numbers of every registered variant, with which tests/golden compares.

    python scripts/golden.py            # compares; exit status 1 if a number has changed
    python scripts/golden.py --write    # stores new and changed numbers; give the reason in CHANGELOG.md

Tolerance: processors sum in different orders, and the resulting error is proportional to the size of the summed terms,
not to that of the sum. The same case in float32 measures this: the tolerance is its error, scaled to float64's
rounding, times `MARGIN`. So a large or badly conditioned value may differ by more than a small or well conditioned one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.report import Report

PATH = Path(__file__).resolve().parent.parent / "tests" / "golden" / "attention.json"
MARGIN = 32
"""The error in float32 is a single sample, which may happen to be small; so the tolerance is a multiple of it."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "mha": [{}, {"num_kv_heads": 2, "position": "none"}],
    "rmha": [{}, {"position": "sinusoid"}],
}


def closed_form(*shape: int) -> torch.Tensor:
    """sin(1), sin(2), ...: numbers that do not depend on a random generator's version, float64."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64).sin().view(shape)


def golden(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[float]:
    """Eight outputs of a variant with fixed weights: element i of parameter n is 0.3 sin(i + n), the input sin(i)."""
    attention = build_attention(kind, {"model_dim": 24, **options}).double()
    with torch.no_grad():
        for number, parameter in enumerate(attention.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            parameter.copy_(0.3 * (index + number).sin())
        out = attention.to(dtype)(closed_form(1, 11, 24).to(dtype))[0].double()
    return [out[t, d].item() for t, d in ((0, 0), (1, 5), (2, 23), (3, 7), (5, 11), (7, 2), (9, 17), (10, 23))]


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """(variant, options) by case name."""
    known = [(kind, options) for kind in ATTENTION for options in OPTIONS.get(kind, [{}])]
    return {" ".join([kind, *(f"{k}={v}" for k, v in options.items())]): (kind, options) for kind, options in known}


def all_golden() -> dict[str, list[float]]:
    """Newly computed values by case name."""
    return {name: golden(*case) for name, case in cases().items()}


def bound(name: str, values: list[float]) -> float:
    """The tolerance of a case (see the head of this file)."""
    single = golden(*cases()[name], torch.float32)
    rounding = torch.finfo(torch.float64).eps
    seen = max(abs(a - b) for a, b in zip(single, values, strict=True)) / torch.finfo(torch.float32).eps
    return MARGIN * rounding * max(seen, *map(abs, values))


def moved(stored: dict[str, list[float]], fresh: dict[str, list[float]]) -> dict[str, str]:
    """A message for each case that is missing, unknown or changed, by case name."""
    problems = dict.fromkeys(stored.keys() ^ fresh.keys(), "only in one of the two")
    for name in stored.keys() & fresh.keys():
        error = max(abs(a - b) for a, b in zip(stored[name], fresh[name], strict=True))
        allowed = bound(name, fresh[name])
        if not error <= allowed:
            problems[name] = f"moved by {error:.3g}, more than {allowed:.3g}"
    return problems


def read_stored() -> dict[str, Any]:
    """The content of tests/golden/attention.json: `cases`, name -> {values, run}, and `runs`, where they come from."""
    content: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return content


def stored_values(content: dict[str, Any]) -> dict[str, list[float]]:
    """The stored values by case name."""
    return {name: case["values"] for name, case in content["cases"].items()}


def updated(content: dict[str, Any], fresh: dict[str, list[float]], run: dict[str, Any]) -> dict[str, Any]:
    """The content with the cases of `fresh`; unchanged cases keep their stored values and their run."""
    problems = moved(stored_values(content), fresh)
    if not problems:
        return content
    runs = [*content["runs"], run]
    found: dict[str, dict[str, Any]] = {
        name: {"values": values, "run": len(runs) - 1} if name in problems else content["cases"][name]
        for name, values in sorted(fresh.items())
    }
    used = sorted({case["run"] for case in found.values()})
    renumbered = {name: {**case, "run": used.index(case["run"])} for name, case in found.items()}
    return {"runs": [runs[index] for index in used], "cases": renumbered}


def main() -> int:
    """Compares, or writes with --write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store new and changed numbers")
    chosen = parser.parse_args()
    content, fresh = read_stored(), all_golden()
    problems = moved(stored_values(content), fresh)
    print("\n".join(f"{name}: {problem}" for name, problem in sorted(problems.items())), file=sys.stderr)
    if not chosen.write:
        return 1 if problems else 0
    report = Report.start(command=["python", "scripts/golden.py", "--write"]).to_dict()
    run = {key: report[key] for key in ("command", "commit", "seed", "device", "versions")}
    PATH.write_text(json.dumps(updated(content, fresh, run), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
