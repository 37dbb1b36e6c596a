"""Every Triton kernel, compiled for GPUs that are not here with the tiles its launcher chooses, fits them."""

import json
import os
import subprocess
import sys

import pytest

from tests.aot import ROOT, SHARED_LIMITS

pytest.importorskip("triton", reason="the package triton is not installed")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """One process for all: this one may run kernels in the interpreter, where nothing can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.aot", "--json"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_nothing_spills(compiled):
    """A register that spills lives in slow memory; on NVIDIA it shows as stack."""
    assert not [row for row in compiled if row["spills"] or row["stack"]]


def test_shared_memory_fits(compiled):
    assert not [row for row in compiled if row["shared"] > SHARED_LIMITS[row["target"]]]


def test_every_target_is_covered(compiled):
    names = {target: {row["name"] for row in compiled if row["target"] == target} for target in SHARED_LIMITS}
    assert names["sm_80"]
    assert names["sm_80"] == names["sm_90"] == names["gfx942"]
    for word in ("forward", "key_bias", "delta", "query", "key", "table", "logits", "streaming"):
        assert any(name.startswith(f"relative_sdpa {word} bf16 H=128") for name in names["sm_80"]), word


def test_registers_are_reported(compiled):
    assert all(0 < row["registers"] <= 512 for row in compiled)
