"""The engines as Python meets them: several threads, several event loops, and what is no prompt or no setting."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from serve.async_engine import AsyncEngine, EngineFailedError, EngineUnavailableError
from serve.config import MAX_THREADS, EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.serving import small_model, tokenizer


def engine(**settings) -> Engine:
    values = {"checkpoint": "none", "max_num_seqs": 3, "max_batched_tokens": 32, **settings}
    return Engine(EngineConfig(**values), model=small_model("rcmha", max_len=512), tokenizer=tokenizer())


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


@pytest.fixture(scope="module")
def shared():
    return engine()


def test_threads_that_share_an_engine_get_their_own_texts(shared):
    def texts(name: str) -> list[str]:
        return [shared.generate([f"{name} {index}"], greedy(15))[0].text for index in range(3)]

    names = ["One", "Two", "Three", "Four"]
    alone = [texts(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(texts, names)) == alone
    assert not shared.has_work()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", r"prompts='Hello' is one text: give a list of prompts, \['Hello'\]"),
        ([1, 2, 3], r"prompts\[0\]=1 is no prompt"),
        ([None], r"prompts\[0\]=None is no prompt"),
        ([b"abc"], r"prompts\[0\]=b'abc' is no prompt"),
        ([[1.5]], "prompt token 1.5 is no whole number"),
        ([[True]], "prompt token True is no whole number"),
        ([["a"]], "prompt token 'a' is no whole number"),
        ([[None]], "prompt token None is no whole number"),
        (["ok", []], "the prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_said(shared, prompts, message):
    with pytest.raises(ValueError, match=message):
        shared.generate(prompts, greedy(2))
    assert not shared.has_work()


def test_tokens_may_come_from_arrays(shared):
    expected = shared.generate([[5, 6]], greedy(5))[0].tokens
    for prompt in (np.array([5, 6]), torch.tensor([5, 6]), (5, 6)):
        assert shared.generate([prompt], greedy(5))[0].tokens == expected


@pytest.mark.parametrize("cache", ["d2o", ["d2o"], 3])
def test_a_cache_that_is_no_mapping_is_named(shared, cache):
    with pytest.raises(ValueError, match=r'cache=.* must be a mapping such as \{"policy": "d2o"'):
        shared.generate(["Hi"], greedy(2), cache=cache)
    with pytest.raises(ValueError, match="cache="):
        engine(cache=cache)


@pytest.mark.parametrize("policy", [["d2o"], 3, None])
def test_a_policy_that_is_no_name_is_repeated(shared, policy):
    with pytest.raises(ValueError, match=r"cache\.policy.* name one of d2o"):
        shared.generate(["Hi"], greedy(2), cache={"policy": policy})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "abc"}, r"stop='abc' is one text: give a tuple of them, \('abc',\)"),
        ({"stop": None}, "stop=None must be texts"),
        ({"stop": (1,)}, r"stop=\(1,\) must be texts"),
        ({"ignore_eos": "no"}, "ignore_eos='no' has type str"),
        ({"max_tokens": None}, "max_tokens=None has type NoneType"),
        ({"max_tokens": 2.0}, "max_tokens=2.0 has type float"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"temperature": "hot"}, "temperature='hot' has type str"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"top_k": -(2**70)}, "top_k=-118"),
        ({"seed": 2**70}, "seed=118"),
        ({"logprobs": 2**70}, "logprobs=118"),
    ],
)
def test_parameters_of_another_type_or_size_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": "8"}, "max_num_seqs='8' has type str"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5 has type float"),
        ({"max_num_seqs": True}, "max_num_seqs=True has type bool"),
        ({"max_queue": None}, "max_queue=None"),
        ({"max_model_len": 64.0}, "max_model_len=64.0 has type float"),
        ({"max_model_len": 513}, "max_model_len=513 is more than the model's max_positions=512"),
        ({"device": 3}, "device=3 has type int"),
        ({"compile_decode": "yes"}, "compile_decode='yes' has type str"),
        ({"threads": 10**6}, f"threads=1000000 must be at most {MAX_THREADS}"),  # torch ends the process there
    ],
)
def test_settings_of_another_type_or_size_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        engine(**settings)


async def take(owner: AsyncEngine, count: int = 5) -> int:
    stream, tokens = owner.submit([[1, 2]], [greedy(count)]), 0
    while news := await asyncio.wait_for(stream.next(), 20):
        tokens += len(news)
    stream.close()
    return tokens


@pytest.fixture
def owner():
    made = AsyncEngine(engine())
    yield made
    made.stop()


def test_one_event_loop_after_another(owner):
    assert [asyncio.run(take(owner)) for _ in range(2)] == [5, 5]

    async def leave_open() -> None:
        await owner.submit([[1, 2]], [greedy(500)]).next()

    asyncio.run(leave_open())
    assert asyncio.run(take(owner)) == 5
    assert len(owner._streams) == 0
    assert owner.health() is None


def test_two_event_loops_at_a_time_are_refused(owner):
    async def first() -> None:
        stream = owner.submit([[1, 2]], [greedy(500)])
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, take(owner))
        with pytest.raises(RuntimeError, match="event loop"):
            await asyncio.to_thread(owner.submit, [[1, 2]], [greedy(5)])
        stream.close()

    asyncio.run(first())
    assert asyncio.run(take(owner)) == 5


@pytest.mark.parametrize("count", [1, 2])
def test_whoever_waits_hears_of_a_stop(owner, count):
    async def wait() -> None:
        stream = owner.submit([[1, 2]] * count, [greedy(500)] * count)
        await stream.next()
        waiting = asyncio.create_task(drain_news(stream))
        await asyncio.sleep(0)
        owner.stop()
        with pytest.raises(EngineFailedError, match="stopped") as error:
            await asyncio.wait_for(waiting, 20)
        assert isinstance(error.value.__cause__, EngineUnavailableError)
        with pytest.raises(EngineUnavailableError, match="stopped"):
            owner.submit([[1, 2]], [greedy(5)])

    asyncio.run(wait())


async def drain_news(stream) -> None:
    while await stream.next():
        pass


def test_logits_that_are_no_numbers_are_one_line_of_log_for_each_request(caplog):
    caplog.set_level(logging.INFO)
    broken = engine()
    broken.model.head.weight[7] = float("nan")
    done = broken.generate(["One", "Two"], greedy(5))
    assert all("not finite" in completion.error for completion in done)
    assert len(caplog.records) == 2
    assert [line.count("\n") for line in caplog.text.splitlines(keepends=True)] == [1, 1]
    assert "Traceback" not in caplog.text
    assert "not finite" in caplog.text
