"""Fifty conversations with one long system prompt: it is read once."""

import pytest
import torch

from attnzoo.models import DecoderConfig, DecoderLM
from serve.config import EngineConfig
from serve.engine import Engine
from serve.scheduling import StepPlan
from tests.helpers.engines import assert_empty, greedy
from tests.helpers.serving import KINDS, TEXT, TOKENS, chat_tokenizer

REQUESTS, SYSTEM_TOKENS, CONTEXT = 50, 1000, 1200
LEARNING_AT_THE_END = ({"policy": "full"}, {"policy": "snapkv", "keep_ratio": 0.2})
SUMMING = ({"policy": "d2o", "keep_ratio": 0.2},)
"""Sums the attention of the whole prompt, which nobody else has kept for it."""


def engine_of(kind: str) -> Engine:
    torch.manual_seed(0)
    layers = [spec | {"num_heads": 2} for spec in KINDS[kind]]
    layers = layers * 2 if len(layers) == 1 else layers
    shape = {"vocab_size": TOKENS, "model_dim": 32, "num_layers": 2, "max_positions": CONTEXT}
    config = EngineConfig(
        checkpoint="none", max_num_seqs=8, max_queue=REQUESTS, itl_target_ms=None,
        cache_bounds={options["policy"]: None for options in (*LEARNING_AT_THE_END, *SUMMING)},
    )  # fmt: skip
    model = DecoderLM(DecoderConfig(attention=layers, init_std=0.3, **shape)).eval()
    return Engine(config, model=model, tokenizer=chat_tokenizer())


def conversations(engine: Engine) -> list[list[int]]:
    """Of one system prompt and fifty questions."""
    system = TEXT
    while len(engine.encode(system)) < SYSTEM_TOKENS:
        system += TEXT
    return [
        engine.encode_chat([{"role": "system", "content": system}, {"role": "user", "content": f"{index}? " * 15}])
        for index in range(REQUESTS)
    ]


@pytest.mark.parametrize("policies", [LEARNING_AT_THE_END, SUMMING], ids=["full and snapkv", "d2o"])
@pytest.mark.parametrize("kind", ["mha", "rcmha", "mixed"])
def test_a_system_prompt_is_read_once_for_all_requests(kind: str, policies: tuple[dict, ...]) -> None:
    engine = engine_of(kind)
    prompts = conversations(engine)
    shared = 1 + next(at for at, token in enumerate(prompts[0]) if token in engine.tokenizer.stop_ids)
    assert shared >= SYSTEM_TOKENS
    assert len({tuple(prompt[:shared]) for prompt in prompts}) == 1
    read = 0
    schedule = engine.scheduler.schedule

    def counting(*given: object) -> StepPlan:
        nonlocal read
        plan = schedule(*given)
        read += sum(chunk.count for chunk in plan.prefill)
        return plan

    engine.scheduler.schedule = counting
    for index, prompt in enumerate(prompts):
        cache = engine.choose_cache(policies[index % len(policies)])
        engine.add_request(str(index), prompt, greedy(2), cache=cache)
    while engine.has_work():
        assert all(delta.error is None for delta in engine.step())
    assert_empty(engine)
    own = sum(len(prompt) - shared for prompt in prompts)
    assert read - own <= 1.1 * shared, f"{(read - own) / shared:.2f} times"
