"""A sequence that raises, wherever it does, fails alone: its neighbours' text is what it would have been."""

import functools
import json
import logging
from dataclasses import replace

import httpx
import pytest
import torch

import serve.sampler
from attnzoo.kvcache.state import State
from attnzoo.models import DecoderLM
from attnzoo.tokenizer.text_stream import TextStream
from serve.engine import Engine
from serve.pools import CompactPool, SlotPool
from serve.request import Request
from tests.helpers.engines import D2O, SECRET, Fault, assert_empty, greedy, make_engine, prompts
from tests.helpers.http_server import (
    post,
    running,
    wait_until,
)

VICTIM = "3"


def texts(engine: Engine, cache: dict | None = None, count: int = 8, **options) -> dict[str, tuple]:
    """(text, reason, error) of requests that run side by side, all sorts of them."""
    choice = engine.choose_cache(cache)
    for index, prompt in enumerate(prompts(count, seed=4)):
        drawn = {"temperature": 3.0, "top_p": 0.9, "seed": index} if index % 2 else {}
        params = greedy(5 + index, **{**drawn, **options})
        engine.add_request(str(index), prompt, params, cache=choice)
    found: dict[str, tuple] = {str(index): ("", None, None) for index in range(count)}
    while engine.has_work():
        for delta in engine.step():
            text = found[delta.request_id][0] + delta.text
            found[delta.request_id] = (text, delta.finish_reason, delta.error)
    assert_empty(engine)
    assert not engine._requests
    assert engine.runner.compact == {}
    return found


MIXED: dict = {"cache_bounds": {"full": None, "d2o": None}, "max_batched_tokens": 16, "max_num_seqs": 5}


@functools.cache
def undisturbed(kind: str, compressed: bool = False) -> dict[str, tuple]:
    """The texts of an engine in which nothing fails."""
    engine = make_engine(**MIXED) if kind == "mixed caches" else make_engine(kind)
    return texts(engine, D2O if compressed else None)


def at_random_numbers(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    inner = serve.sampler.wish_of

    def wish_of(request: Request, logits: torch.Tensor):
        if request.request_id == VICTIM and len(request.generated) == 2:
            fault.fire()
        return inner(request, logits)

    patch.setattr(serve.sampler, "wish_of", wish_of)


def at_sampling(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """The rows of a step together, and of these one once more when it is tried alone."""
    inner, guilty = serve.sampler.choose_rows, []

    def choose_rows(logits: torch.Tensor, wishes: list):
        if not guilty and len(wishes) > 2:
            guilty.append(wishes[1])
            raise RuntimeError
        if guilty and wishes[0] is guilty[0]:
            fault.fire()
        return inner(logits, wishes)

    patch.setattr(serve.sampler, "choose_rows", choose_rows)


def at_detokenising(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    inner = TextStream.push

    def push(self, token, *others):
        victim = engine._requests.get(VICTIM)
        if victim is not None and self is victim.text and len(victim.generated) == 3:
            fault.fire()
        return inner(self, token, *others)

    patch.setattr(TextStream, "push", push)


def at_the_end_of_the_text(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    inner = TextStream.finish

    def finish(self):
        if VICTIM in engine._requests and self is engine._requests[VICTIM].text:
            fault.fire()
        return inner(self)

    patch.setattr(TextStream, "finish", finish)


def at_bad_logits(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    inner = engine.runner.run

    def run(plan, requests, drafts):
        ran = inner(plan, requests, drafts)
        if VICTIM in ran.sampled and len(requests[VICTIM].generated) == 2:
            fault.fired += 1
            bad = ran.logits_RV.clone()
            bad[ran.sampled.index(VICTIM), 7] = torch.nan
            return replace(ran, logits_RV=bad)
        return ran

    patch.setattr(engine.runner, "run", run)


def at_compression(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    inner, calls = DecoderLM.compress, iter(range(1000))

    def compress(self, state, joinable=False):
        if next(calls) == 3:
            fault.fire()
        return inner(self, state, joinable)

    patch.setattr(DecoderLM, "compress", compress)


def at_joining(fault: Fault, patch: pytest.MonkeyPatch, engine: Engine) -> None:
    inner, calls = CompactPool._join, iter(range(1000))

    def join(self, slot, row):
        if next(calls) == 3:
            fault.fire()
        return inner(self, slot, row)

    patch.setattr(CompactPool, "_join", join)


ANYWHERE = [at_random_numbers, at_sampling, at_detokenising, at_the_end_of_the_text, at_bad_logits]


@pytest.mark.parametrize(
    ("where", "cache"),
    [*((where, cache) for where in ANYWHERE for cache in (None, D2O)), (at_compression, D2O), (at_joining, D2O)],
)
def test_one_sequence_fails_alone(where, cache, monkeypatch, caplog):
    expected = undisturbed("mixed caches", compressed=cache is not None)
    engine, fault = make_engine(**MIXED), Fault()
    with monkeypatch.context() as patch:
        where(fault, patch, engine)
        found = texts(engine, cache)
    assert fault.fired == 1
    failed = [request_id for request_id, (_, reason, _) in found.items() if reason == "error"]
    assert len(failed) == 1
    assert {r: x for r, x in found.items() if r not in failed} == {r: x for r, x in expected.items() if r not in failed}
    text, _, error = found[failed[0]]
    assert expected[failed[0]][0].startswith(text)
    assert ("not finite" if where is at_bad_logits else SECRET) in error
    assert SECRET not in caplog.text
    assert "failed" in caplog.text
    assert ("row by row" in caplog.text) == (where is at_sampling), "that rows are chosen one by one is told"
    # The engine is as good as new.
    assert texts(engine, cache) == expected


def test_log_probabilities_that_fail_fail_alone(monkeypatch):
    expected = texts(make_engine(), logprobs=2)
    engine, fault = make_engine(), Fault()
    with monkeypatch.context() as patch:
        at_sampling(fault, patch, engine)
        found = texts(engine, logprobs=2)
    failed = [request_id for request_id, (_, reason, _) in found.items() if reason == "error"]
    assert len(failed) == fault.fired == 1
    assert {r: x for r, x in found.items() if r not in failed} == {r: x for r, x in expected.items() if r not in failed}


@pytest.mark.parametrize("kind", ["rcmha", "linear", "window", "mixed"])
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_a_batch_that_fails_is_computed_again_for_each_alone(kind, part, monkeypatch):
    """Half way through its layers, where keys and values of the first are written already; the victim fails again."""
    expected = undisturbed(kind)
    engine, fired = make_engine(kind), []
    last = engine.model.layers()[-1]
    inner, whole, step = last.extend, getattr(SlotPool, part), iter(range(1000))

    def extend(*given):
        if fired and fired[-1] == "armed":
            fired[-1] = "raised"
            raise RuntimeError(SECRET)
        return inner(*given)

    def armed(self, work, *more):
        if len(work) > 1 and next(step) in (0, 2, 5):
            fired.append("armed")
        return whole(self, work, *more)

    monkeypatch.setattr(last, "extend", extend)
    monkeypatch.setattr(SlotPool, part, armed)
    assert texts(engine) == expected
    assert fired.count("raised") >= (3 if part == "decode" else 1)


def test_of_a_batch_only_the_guilty_fails(monkeypatch):
    expected = texts(make_engine())
    engine = make_engine()
    inner = engine.model.extend_hidden

    def extend(tokens, state, **given):
        if tokens.shape[1] == 1 and VICTIM in engine._requests:
            generated = engine._requests[VICTIM].generated
            if len(generated) == 3 and generated[-1] in tokens[:, 0].tolist():
                raise RuntimeError(SECRET)
        return inner(tokens, state, **given)

    monkeypatch.setattr(engine.model, "extend_hidden", extend)
    found = texts(engine)
    failed = {request_id for request_id, (_, reason, _) in found.items() if reason == "error"}
    assert VICTIM in failed
    others = {r: x for r, x in found.items() if r not in failed}
    assert others == {r: expected[r] for r in others}
    assert len(others) >= 5


def test_a_group_whose_step_fails_half_way_fails_and_the_other_groups_go_on(monkeypatch):
    """A cache that evicts has lost what it merged: its rows cannot be computed again."""
    settings = {"cache_bounds": {"full": None, "d2o": None}, "max_batched_tokens": 40}
    engine = make_engine(**settings)
    work = prompts(4, seed=4)
    plain = [completion.text for completion in make_engine(**settings).generate(work[:2], greedy(12))]
    for index, prompt in enumerate(work):
        cache = engine.choose_cache(None if index < 2 else D2O)
        engine.add_request(str(index), prompt, greedy(12), cache=cache)
    for _ in range(5):
        engine.step()
    inner = CompactPool.decode

    def decode(self, *given):
        inner(self, *given)
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr(CompactPool, "decode", decode)
        news = engine.step()
    failed = {delta.request_id: delta.error for delta in news if delta.error}
    assert set(failed) == {"2", "3"}
    assert all("RuntimeError" in error and SECRET not in error for error in failed.values())
    assert engine.runner.compact == {}
    tokens = [engine._requests[str(index)].generated for index in range(2)]
    while engine.has_work():
        engine.step()
    assert [engine.tokenizer.decode(out) for out in tokens] == plain
    again = engine.generate(work[2:], greedy(12), cache=D2O)
    assert [x.finish_reason for x in again] == ["length", "length"]


def test_rows_that_are_lost_while_one_joins_fail_and_no_other(monkeypatch):
    engine = make_engine(cache_bounds={"full": None, "d2o": None}, max_batched_tokens=64, max_num_seqs=6)
    choice = engine.choose_cache(D2O)
    for index in range(3):
        engine.add_request(str(index), [5 + index] * 9, greedy(20), cache=choice)
    engine.add_request("plain", [9] * 9, greedy(20))
    engine.step()
    joined = State.joined

    def lost(self, other):
        raise MemoryError

    for name in ("x", "y"):
        engine.add_request(name, [8] * 9, greedy(3), cache=choice)
    calls = iter(range(9))
    monkeypatch.setattr(State, "joined", lambda self, other: (lost if next(calls) == 0 else joined)(self, other))
    news = engine.step()
    failed = {delta.request_id for delta in news if delta.error}
    assert failed == {"0", "1", "2", "x"}
    assert {delta.request_id for delta in news} == {"0", "1", "2", "x", "y", "plain"}
    while engine.has_work():
        assert not any(delta.error for delta in engine.step())
    assert engine.runner.compact == {}


def test_over_http_the_owner_reads_why_and_the_others_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    with running(max_num_seqs=4) as (url, owner):
        fine = post(url, prompt="Other", max_tokens=30, ignore_eos=True, temperature=0).json()["choices"][0]["text"]
        inner = TextStream.push

        def push(self, token, *others):
            mine = [r for r in owner.engine._requests.values() if r.text is self]
            if mine and mine[0].params.max_tokens == 77 and len(mine[0].generated) == 3:
                Fault().fire()
            return inner(self, token, *others)

        monkeypatch.setattr(TextStream, "push", push)
        for stream in (False, True):
            bad = post(url, prompt="Bad", max_tokens=77, ignore_eos=True, temperature=0, stream=stream, n=1)
            if stream:
                assert bad.status_code == 200
                error = json.loads(bad.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
                assert "[DONE]" not in bad.text
            else:
                assert bad.status_code == 500
                error = bad.json()["error"]
            assert (error["code"], error["type"]) == ("request_failed", "server_error")
            assert SECRET in error["message"]
            good = post(url, prompt="Other", max_tokens=30, ignore_eos=True, temperature=0)
            assert good.json()["choices"][0]["text"] == fine
        assert httpx.get(f"{url}/health").status_code == 200
        assert 'finished_reason="error"} 2.0' in httpx.get(f"{url}/metrics").text
        assert SECRET not in caplog.text
        assert "failed: RuntimeError" in caplog.text
        wait_until(lambda: not owner._streams, "left")


def test_a_request_that_cannot_be_queued_fails_alone(monkeypatch):
    with running() as (url, owner):
        inner = owner.engine.add_request

        def add(request_id, prompt, params, *rest):
            if params.max_tokens == 77:
                Fault().fire()
            inner(request_id, prompt, params, *rest)

        monkeypatch.setattr(owner.engine, "add_request", add)
        bad = post(url, max_tokens=77)
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "request_failed")
        assert post(url, max_tokens=3).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
