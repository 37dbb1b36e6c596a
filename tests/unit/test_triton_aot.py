"""Every Triton kernel, compiled for GPUs that are not here with the tiles its launcher chooses, fits them."""

import json
import os
import subprocess
import sys

import pytest

from tests.aot import ROOT, SHARED_LIMITS, all_cases

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.fixture(scope="module", params=SHARED_LIMITS)
def compiled(request) -> list[dict]:
    """What all kernels take on one target, from one process: this one may run kernels in the interpreter, where nothing
    can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot", "--json", "--target", request.param]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_kernels_fit_the_target(compiled):
    """A register that spills lives in slow memory; on NVIDIA it shows as stack."""
    assert not [row for row in compiled if row["spills"] or row["stack"]]
    assert not [row for row in compiled if row["shared"] > SHARED_LIMITS[row["target"]]]
    assert all(0 < row["registers"] <= 512 for row in compiled)
    # Not the same names: in the interpreter, where this process lists them, tiles have other sizes.
    assert len(compiled) == len(cases(compiled[0]["target"]))


def cases(target: str) -> list[str]:
    return [case.name for case in all_cases() if getattr(case, "target", "any") in ("any", target)]


def test_every_target_is_covered():
    assert cases("sm_80")
    assert set(cases("sm_80")) == set(cases("sm_90")) == set(cases("gfx942"))
    for word in ("forward", "key_bias", "delta", "query", "key", "table", "logits", "streaming"):
        assert any(name.startswith(f"relative_sdpa {word} bf16 H=128") for name in cases("sm_80")), word
