"""Writes the golden numbers of every registered variant, which tests/golden compares with.

python scripts/golden.py            # compares, exit status 1 when a number moved
python scripts/golden.py --write    # replaces tests/golden/attention.json; say why in CHANGELOG.md
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
TOLERANCE = 1e-12
REASON = "float64; only the order of sums may differ between machines, about 1e-15 for values of order 0.1"
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "mha": [{}, {"num_kv_heads": 2, "position": "none"}],
    "rmha": [{}, {"position": "sinusoid"}],
}


def closed_form(*shape: int) -> torch.Tensor:
    """Numbers that no random generator of any version can change: sin(1), sin(2), ..."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float64).sin().view(shape)


def golden(kind: str, options: dict[str, Any]) -> list[float]:
    """Eight outputs of the variant at fixed weights: parameter p_i = 0.3 sin(i + its number), input sin(i)."""
    attention = build_attention(kind, {"model_dim": 24, **options}).double()
    with torch.no_grad():
        for number, parameter in enumerate(attention.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            parameter.copy_(0.3 * (index + number).sin())
        out = attention(closed_form(1, 11, 24))[0]
    return [out[t, d].item() for t, d in ((0, 0), (1, 5), (2, 23), (3, 7), (5, 11), (7, 2), (9, 17), (10, 23))]


def all_golden() -> dict[str, list[float]]:
    """Values by the name of the case."""
    cases = [(kind, options) for kind in ATTENTION for options in OPTIONS.get(kind, [{}])]
    return {
        " ".join([kind, *(f"{k}={v}" for k, v in options.items())]): golden(kind, options) for kind, options in cases
    }


def compare(stored: dict[str, list[float]], fresh: dict[str, list[float]], tolerance: float) -> list[str]:
    """One line for every case that is missing, unknown or moved."""
    problems = [f"{name}: only in one of the two" for name in sorted(stored.keys() ^ fresh.keys())]
    for name in sorted(stored.keys() & fresh.keys()):
        error = max(abs(a - b) for a, b in zip(stored[name], fresh[name], strict=True))
        if error > tolerance:
            problems.append(f"{name}: moved by {error:.3g}, more than {tolerance:.3g}")
    return problems


def main() -> int:
    """Compares, or writes with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the stored numbers")
    chosen = parser.parse_args()
    if chosen.write:
        report = Report.start(command=["python", "scripts/golden.py", "--write"]).to_dict()
        provenance = {key: report[key] for key in ("command", "commit", "seed", "device", "versions")}
        content = provenance | {"tolerance": TOLERANCE, "reason": REASON, "values": all_golden()}
        PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return 0
    problems = compare(json.loads(PATH.read_text(encoding="utf-8"))["values"], all_golden(), TOLERANCE)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
