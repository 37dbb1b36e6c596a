"""Every Triton kernel, compiled for GPUs that are not here with the tiles its launcher chooses, fits them."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.aot import ROOT, SHARED_LIMITS, cases_of

pytest.importorskip("triton", reason="the package triton is not installed")


def compiled(target: str, *options: str) -> list[dict]:
    """What kernels take on one target, from another process: this one may run kernels in the interpreter, where nothing
    can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.aot", "--json", "--target", target, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(rows: list[dict], limit: int) -> None:
    """A register that spills lives in slow memory; on NVIDIA it shows as stack."""
    assert not [row for row in rows if row["spills"] or row["stack"]]
    assert not [row for row in rows if row["shared"] > limit]
    assert all(0 < row["registers"] <= 512 for row in rows)


@pytest.mark.heavy
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_kernels_fit_the_target_at_their_widest(target):
    rows = compiled(target, "--widest")
    check(rows, SHARED_LIMITS[target])
    # Not the same names: in the interpreter, where this process lists them, tiles have other sizes.
    assert len(rows) == len(cases_of(target, widest=True)) == len({id(case.kernel) for case in cases_of(target)})


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_kernels_fit_the_target(target):
    rows = compiled(target)
    check(rows, SHARED_LIMITS[target])
    assert len(rows) == len(cases_of(target))


def test_every_target_is_covered():
    names = {target: [case.name for case in cases_of(target)] for target in SHARED_LIMITS}
    assert names["sm_80"]
    assert set(names["sm_80"]) == set(names["gfx942"]) >= set(names["sm_90"])
    beyond = set(names["sm_80"]) - set(names["sm_90"])  # registers spill there: the head of tilings.py
    assert all(name.startswith("relative_sdpa") and name.endswith("fp32 H=128 P=300 prefix") for name in beyond)
    for word in ("forward", "key_bias", "delta", "query", "key", "table", "logits", "streaming"):
        assert any(name.startswith(f"relative_sdpa {word} bf16 H=128") for name in names["sm_80"]), word
