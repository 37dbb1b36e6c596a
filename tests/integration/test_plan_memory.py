"""The plan's memory against real runs: DeepSpeed's engine on one and two ranks, and a server's state."""

import json
from pathlib import Path

import pytest
import torch

from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.planner.serving import exact_caches
from serve.arena import PAGE
from serve.runner import Runner
from tests.helpers.training import run_ranks

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "memory_run.py"


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (1, ["0:fp32", "1:fp32", "0:bf16", "1:bf16"]),
        (2, ["0:fp32", "1:fp32"]),
        pytest.param(2, ["2:fp32", "3:fp32", "1:bf16", "2:bf16", "3:bf16"], marks=pytest.mark.slow),
    ],
)
def test_planned_memory_of_a_rank_is_what_training_takes(ranks, cases):
    """Within 10 %: weights, master copies, gradients, optimizer state, activations and workspace, at their peak in two
    steps of two passes, from the allocator's records of a rank."""
    result = run_ranks([str(WORKER), *cases], ranks)
    found = [json.loads(text[text.index("{") :]) for text in result.stdout.splitlines() if '"measured"' in text]
    print(found)
    assert [numbers["case"] for numbers in found] == cases
    for numbers in found:
        assert numbers["planned"] == pytest.approx(numbers["measured"], rel=0.10), numbers


@pytest.mark.parametrize("attention", ["mha", "rcmha", "linear", {"kind": "mha", "window": 20, "sinks": 2}], ids=str)
def test_planned_state_of_sequences_is_what_a_server_takes(attention):
    """But for the rest of a page that each head's keys and values may fill."""
    config = DecoderConfig(vocab_size=64, model_dim=24, num_layers=2, attention=attention)
    for dtype in (torch.float32, torch.bfloat16):
        model = DecoderLM(config).to(dtype)
        state = list(exact_caches(model, 100).values())[-1]
        pool, heads = Runner(model, 7, 100).full, 2 * 4 * config.num_layers
        taken = 7 * pool.row_bytes(100) + pool.nbytes
        assert 7 * state <= taken <= 7 * (state + heads * PAGE)
