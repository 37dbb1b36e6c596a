"""From a variant to an answer: the server says what the model says."""

import itertools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from attnzoo.attention import Attention
from attnzoo.checkpoint import load_model, save_model
from attnzoo.models import generate
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from serve.speculation import Source
from tests.contract.cases import streams
from tests.contract.saved import decoder_of
from tests.helpers.drafting import draft_always, sources
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
        for kept in (True, False):
            said = answers(path, moves=(3, 5, 8), kept=kept)
            assert said == expected, (
                f"set aside, {'with' if kept else 'without'} its state, a sequence goes on otherwise"
            )
        texts = {tuple(prompt): text for prompt, text in zip(PROMPTS, expected, strict=True)}
        said = answers(path, source=sources(texts)["half"])
        assert said == expected, "with tokens that are drafted, the text is another one"


def answers(
    path: Path, moves: Collection[int] = (), kept: bool = True, source: Source | None = None
) -> list[list[int]]:
    """The server's engine, all prompts at once. moves: steps before which all that run are set aside; kept: whether
    there is memory for their states. source: drafts of their next tokens; None: there are none."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 9, "max_queue": 100, "prefix_mib": 64 if kept else 0}
    engine = Engine(EngineConfig(checkpoint=str(path), prompt_lookup=0 if source is None else 2, **settings))
    if source is not None:
        draft_always(engine, source)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = []
    for index, prompt in enumerate(PROMPTS):
        requests.append(engine.add_request(str(index), prompt, params))
    for step in itertools.count():
        if not engine.has_work():
            break
        for table in list(engine.scheduler.tables.values()) if step in moves else ():
            for request_id in list(table.ids):
                engine.preemption.set_aside(engine.scheduler, engine._requests[request_id])
        engine.step()
    return [list(request.generated) for request in requests]
