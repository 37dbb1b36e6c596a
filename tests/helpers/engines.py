"""Engines of small models, work for them, and failures that are made."""

import random
from typing import Any, NoReturn

import pytest
from torch import Tensor

from serve.config import EngineConfig
from serve.engine import Engine
from serve.pools.parts import Seen
from serve.pools.slots import Prompts
from serve.request import Request, SamplingParams
from tests.helpers.serving import TOKENS, small_model, tokenizer


def make_engine(kind: str = "rcmha", **settings: Any) -> Engine:
    """Four slots and small steps, so that requests wait, are read in pieces and move."""
    # itl_target_ms: steps are not cut by how long they take on this machine.
    settings = {"max_num_seqs": 4, "max_batched_tokens": 9, "max_queue": 100, "itl_target_ms": None, **settings}
    return Engine(EngineConfig(checkpoint="none", **settings), model=small_model(kind), tokenizer=tokenizer())


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of random tokens, of 1 to 37 of them."""
    draw = random.Random(seed)
    return [[draw.randrange(3, TOKENS) for _ in range(draw.choice([1, 2, 3, 5, 11, 23, 37]))] for _ in range(count)]


def run_staggered(
    engine: Engine,
    work: list[tuple[list[int], SamplingParams]],
    seed: int = 1,
    caches: list[dict] | None = None,
    moves: float = 0.0,
) -> list[list[int]]:
    """Requests arrive at random steps; returns their tokens. `caches`: what each asks for. moves: how often, in a step,
    a running request is set aside."""
    draw = random.Random(seed)
    waiting = list(enumerate(work))[::-1]
    out: dict[int, list[int]] = {}
    seen: dict[str, Request] = {}
    while waiting or engine.has_work():
        while waiting and (draw.random() < 0.4 or not engine.has_work()):
            index, (prompt, params) = waiting.pop()
            cache = engine.choose_cache(caches[index]) if caches else None
            seen[str(index)] = engine.add_request(str(index), prompt, params, cache=cache)
        if moves and draw.random() < moves:
            set_one_aside(engine, draw)
        for delta in engine.step():
            if delta.finish_reason is not None:
                out[int(delta.request_id)] = seen[delta.request_id].generated
    assert_empty(engine)
    return [out[index] for index in range(len(work))]


def set_one_aside(engine: Engine, draw: random.Random) -> None:
    """One of those that run, by chance, if there is one."""
    running = [request_id for table in engine.scheduler.tables.values() for request_id in table.ids]
    if running:
        engine.preemption.set_aside(engine.scheduler, engine._requests[draw.choice(running)])


def assert_empty(engine: Engine) -> None:
    """No request is left, and nothing of one in any slot."""
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    assert not engine.prefixes.tree.lent, "the state of a sequence that left is kept"
    held = {} if engine.runner.full is None else engine.runner.full.state.tensors()
    for name, tensor in held.items():
        assert not tensor.any(), f"{name} holds something of a sequence that left"


def greedy(count: int, **options: Any) -> SamplingParams:
    """Exactly `count` tokens, the likeliest each."""
    return SamplingParams(max_tokens=count, ignore_eos=True, **options)


def read_one_by_one(patch: pytest.MonkeyPatch, engine: Engine) -> list[int]:
    """Prompts cannot be read side by side from now on; returns, as it grows, how many each time could not."""
    read, failed = engine.runner.full.prefill, list[int]()

    def sometimes(chunks: Prompts, seen: Seen) -> Tensor:
        if len(chunks) > 1:
            failed.append(len(chunks))
            raise RuntimeError("together")
        return read(chunks, seen)

    patch.setattr(engine.runner.full, "prefill", sometimes)
    return failed


SECRET = "SECRET prompt"
"""What a failure says, and no log may hold."""
D2O = {"policy": "d2o", "keep_ratio": 0.5, "min_tokens": 0}


class Fault:
    """Raises, and counts how often it did."""

    def __init__(self) -> None:
        self.fired = 0

    def fire(self) -> NoReturn:
        """Raises RuntimeError with `SECRET`."""
        self.fired += 1
        raise RuntimeError(SECRET)
