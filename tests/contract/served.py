"""From a variant to an answer: the server says what the model says."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from attnzoo.attention import Attention
from attnzoo.checkpoint import load_model, save_model
from attnzoo.models import generate
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.contract.cases import streams
from tests.contract.saved import decoder_of
from tests.helpers.serving import tokenizer

PROMPTS = [[5, 17, 301, 44, 9], [7], [29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39]]
NEW_TOKENS = 6


def check_served(build: Callable[[], Attention]) -> None:
    """Loaded, the model generates the text that it generated before; the server's is the same."""
    attention = build()
    if not streams(attention):
        return
    model = decoder_of(attention)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder) / "model", model, tokenizer=tokenizer())
        loaded = load_model(path)
        half = load_model(path, dtype=torch.bfloat16)
        assert generate(half, PROMPTS, max_new_tokens=2), "loaded in bfloat16 it does not generate"
        expected = [generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0] for prompt in PROMPTS]
        assert generate(loaded, PROMPTS, max_new_tokens=NEW_TOKENS) == expected, "loaded, it generates another text"
        assert answers(path) == expected, "the server says something else than the model"


def answers(path: Path) -> list[list[int]]:
    """The server's engine, all prompts at once."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 9, "max_queue": 100}
    engine = Engine(EngineConfig(checkpoint=str(path), **settings))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = []
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, params)
        requests.append(engine._requests[str(index)])
    while engine.has_work():
        engine.step()
    return [list(request.generated) for request in requests]
