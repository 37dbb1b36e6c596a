"""Calls of the engine that fail or are interrupted, and what others hear of them: nothing is lost or left behind."""

import pytest
import torch

from attnzoo.tokenizer.text_stream import TextStream
from serve.engine import Engine
from serve.faults import DeviceError
from serve.pools import SlotPool
from tests.helpers.engines import D2O, SECRET, Fault, assert_empty, greedy, make_engine, prompts


def test_a_dead_device_ends_the_engine(monkeypatch):
    engine = make_engine()
    engine.add_request("a", [5, 6], greedy(5))
    engine.step()
    monkeypatch.setattr(SlotPool, "decode", lambda self, *given: Fault().fire())
    monkeypatch.setattr(torch, "ones", lambda *_, **__: Fault().fire())
    with pytest.raises(DeviceError, match="cpu does not answer"):
        engine.step()


COMPACT: dict = {"cache": D2O, "max_num_seqs": 3}
WORK = prompts(7, seed=4)


@pytest.fixture(scope="module")
def uninterrupted():
    return [x.tokens for x in make_engine(**COMPACT).generate(WORK, greedy(6))]


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("run", KeyboardInterrupt),
        ("run", RuntimeError("odd")),
        ("joined", GeneratorExit),
        ("joined", RuntimeError("odd")),
        ("release", SystemExit),
        ("release", RuntimeError("odd")),
    ],
)
def test_an_interrupted_call_leaves_nothing_behind(failure, where, uninterrupted, monkeypatch):
    """Wherever it is, by an error and by what is none."""
    engine, calls = make_engine(**COMPACT), iter(range(1000))
    engine.add_request("other", [5, 6, 7], greedy(30))
    inner = getattr(engine.runner, where)

    def interrupted(*arguments):
        result = inner(*arguments)
        if next(calls) == 3:
            raise failure
        return result

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, where, interrupted)
        with pytest.raises(failure if isinstance(failure, type) else RuntimeError):
            engine.generate(WORK, greedy(6))
    assert not engine._requests
    assert not engine.scheduler.has_work()
    news = {delta.request_id: delta.error for delta in engine.step()}
    assert "failed while it worked" in news.pop("other")
    assert not news
    assert not engine.has_work()
    assert [x.tokens for x in engine.generate(WORK, greedy(6))] == uninterrupted


def test_whoever_ended_in_a_step_that_fails_later_has_its_end(monkeypatch):
    engine = make_engine()
    for index in range(3):
        engine.add_request(str(index), [5 + index, 6], greedy(1))
    inner, calls = engine.runner.release, iter(range(9))

    def release(request, plan):
        if next(calls) == 1:
            raise RuntimeError("odd")
        inner(request, plan)

    monkeypatch.setattr(engine.runner, "release", release)
    with pytest.raises(RuntimeError, match="odd"):
        engine.step()
    news = {delta.request_id: delta.finish_reason for delta in engine.step()}
    assert news == {"0": "length", "1": "error", "2": "error"}
    assert_empty(engine)


def test_news_of_others_waits_while_a_call_runs():
    engine = make_engine(max_num_seqs=3)
    expected = make_engine().generate([[5, 6, 7]], greedy(9))[0].text
    engine.add_request("other", [5, 6, 7], greedy(9))
    assert len(engine.generate(prompts(4), greedy(12))) == 4
    text = ""
    while engine.has_work():
        for delta in engine.step():
            assert delta.request_id == "other"
            text += delta.text
    assert text == expected


def test_a_call_tells_of_a_prompt_that_fails_and_keeps_the_others(monkeypatch):
    engine, fault = make_engine(), Fault()
    expected = make_engine().generate(prompts(5), greedy(6))
    inner, calls = TextStream.push, iter(range(100))
    monkeypatch.setattr(
        TextStream, "push", lambda self, *news: fault.fire() if next(calls) == 4 else inner(self, *news)
    )
    found = engine.generate(prompts(5), greedy(6))
    (bad,) = [index for index, completion in enumerate(found) if completion.finish_reason == "error"]
    assert SECRET in found[bad].error
    for index, completion in enumerate(found):
        assert index == bad or (completion.text, completion.error) == (expected[index].text, None)


def test_an_extreme_request_harms_nobody():
    """Every sampling parameter at its ends, all at once."""
    extremes = [
        {"temperature": 1e-40},
        {"temperature": 5e-324, "top_p": 1e-300},
        {"temperature": 100, "top_k": 2**70},
        {"temperature": 1, "top_p": 1e-300, "top_k": 1, "logprobs": 20},
        {"temperature": 1e-5, "seed": -(2**63)},
        {"temperature": 1e-4, "seed": 2**63 - 1, "top_p": 0.9999999999},
    ]
    engine = make_engine()
    expected = generate_one(make_engine())
    for index, options in enumerate(extremes):
        engine.add_request(str(index), [5, 6, 7], greedy(5, **options))
    engine.add_request("plain", [9, 8, 7], greedy(8))
    text = ""
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            text += delta.text if delta.request_id == "plain" else ""
    assert text == expected


def generate_one(engine: Engine) -> str:
    return engine.generate([[9, 8, 7]], greedy(8))[0].text
