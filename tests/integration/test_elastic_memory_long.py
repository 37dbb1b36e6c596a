"""Long contexts of all cache policies in one budget of memory, by the system's own accounting."""

import gc
import sys

import pytest
import torch

from attnzoo.models import DecoderConfig, DecoderLM
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.resident import resident
from tests.helpers.serving import TOKENS, tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rows take all their memory from the start"),
]

BUDGET_MIB, SLOTS, CONTEXT, WHOLE, NEW = 2048, 64, 8192, 20, 60
SMALL = (
    {"policy": "d2o", "keep_ratio": 0.2},
    {"policy": "snapkv", "keep_ratio": 0.2},
    {"policy": "streaming", "max_tokens": 1600},
    {"policy": "think", "channel_ratio": 0.5, "value_channel_ratio": 0.5},
    {"policy": "random_tokens", "keep_ratio": 0.2},
)


def test_64_sequences_of_8k_tokens_take_no_more_than_the_budget():
    """Full caches of all of them would take twice as much. Prompts are the same, so that most of them are copied."""
    torch.manual_seed(0)
    # Few heads: what a step computes by the way is small beside the caches.
    attention = {"kind": "mha", "num_heads": 2}
    shape = {"vocab_size": TOKENS, "model_dim": 256, "num_layers": 4, "max_positions": CONTEXT}
    model = DecoderLM(DecoderConfig(attention=attention, **shape)).eval()
    settings = {"max_num_seqs": SLOTS, "max_batched_tokens": 1024, "max_model_len": CONTEXT, "max_queue": SLOTS}
    config = EngineConfig(
        checkpoint="none", cache_mib=BUDGET_MIB, max_caches=len(SMALL), itl_target_ms=None, **settings,
        cache_bounds={"full": None, **{options["policy"]: None for options in SMALL}},
    )  # fmt: skip
    engine = Engine(config, model=model, tokenizer=tokenizer())
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    engine.generate([[5, 6, 7] * 100], params)
    prompt = torch.randint(3, TOKENS, (CONTEXT - NEW,)).tolist()
    gc.collect()
    before, most, together, budget = resident(), 0, 0, BUDGET_MIB << 20
    for index in range(SLOTS):
        cache = {"policy": "full"} if index < WHOLE else SMALL[index % len(SMALL)]
        engine.add_request(str(index), prompt, params, cache=engine.choose_cache(cache))
    while engine.has_work():
        for delta in engine.step():
            assert delta.finish_reason in (None, "length")
        together = max(together, engine.scheduler.num_running)
        counted = engine.runner.pool_bytes
        most = max(most, counted)
        assert counted <= budget
        assert resident() - before - engine.prefixes.tree.nbytes <= 1.05 * budget
    assert together >= 60
    assert most > 0.9 * budget
    engine.prefixes.clear()
    gc.collect()
    assert resident() - before <= 0.05 * budget


ROWS = 8
"""Sequences of the full cache that the budget holds."""


def test_d2o_at_a_fifth_runs_four_times_as_many_sequences():
    """In the same budget, at once: those that decode, by the scheduler, and their bytes as allocated."""
    torch.manual_seed(0)
    shape = {"vocab_size": TOKENS, "model_dim": 64, "num_layers": 2, "max_positions": CONTEXT}
    model = DecoderLM(DecoderConfig(attention={"kind": "mha", "num_heads": 2}, **shape)).eval()
    prompt = torch.randint(3, TOKENS, (CONTEXT - NEW,)).tolist()
    row = model.cost(batch=1, tokens=1, context=CONTEXT).state_bytes
    together = {}
    for policy, options in {"full": {}, "d2o": {"keep_ratio": 0.2}}.items():
        config = EngineConfig(
            checkpoint="none", cache={"policy": policy, **options}, cache_mib=ROWS * row >> 20, itl_target_ms=None,
            max_num_seqs=SLOTS, max_batched_tokens=1024, max_queue=SLOTS,
        )  # fmt: skip
        engine = Engine(config, model=model, tokenizer=tokenizer())
        engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))  # from now on prompts are copied
        for index in range(SLOTS):
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=NEW, ignore_eos=True))
        most = 0
        while engine.has_work():
            assert all(delta.error is None for delta in engine.step())
            most = max(most, sum(table.decoding for table in engine.scheduler.tables.values()))
            assert engine.runner.pool_bytes <= 1.001 * ROWS * row  # lengths of empty rows beside them
        together[policy] = most
    assert together["full"] >= ROWS - 1, together
    assert together["d2o"] >= 4 * together["full"], together
