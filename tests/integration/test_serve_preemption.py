"""Sequences that make way for others say what they would have said."""

import random
import time

import pytest

from attnzoo.attention.edits import Edits
from attnzoo.generation import AttentionWish
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams, Urgency
from tests.helpers.engines import D2O, Fault, assert_empty, greedy, make_engine, prompts, run_staggered, set_one_aside
from tests.helpers.serving import small_model, tokenizer

SNAPKV = {"policy": "snapkv", "keep_ratio": 0.5, "window": 4, "min_tokens": 0}
THINK = {"policy": "think", "channel_ratio": 0.5, "window": 4}
POLICIES = {"full": {"policy": "full"}, "d2o": D2O, "snapkv": SNAPKV, "think": THINK}


WISH = AttentionWish(read=Edits.from_json([{"map": {}}]))


def counts(engine):
    """(kept, dropped): how often the state of a sequence that was set aside was kept, and how often not."""
    lines = dict(line.rsplit(" ", 1) for line in engine.render_metrics().decode().splitlines() if line[0] != "#")
    return tuple(float(lines[f'attnzoo_num_preemptions_total{{state="{state}"}}']) for state in ("kept", "dropped"))


def sampled(count, seed):
    return SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.8, seed=seed, logprobs=2)


@pytest.mark.parametrize("prefix_mib", [256, 0], ids=["kept", "read anew"])
@pytest.mark.parametrize(
    ("kind", "policy"),
    [("linear", "full"), ("mixed", "full"), ("mha", "d2o"), ("mha", "think"), ("rcmha", "full"), ("rcmha", "snapkv")],
)
def test_who_is_set_aside_says_the_same(kind, policy, prefix_mib):
    given = prompts(6, seed=3)
    work = [(p, greedy(8) if n % 2 else sampled(8, seed=n)) for n, p in enumerate(given)]
    caches = [POLICIES[policy if n % 3 else "full"] for n in range(len(work))]
    settings = {"cache_bounds": dict.fromkeys({"full", policy}), "max_caches": 3, "prefix_mib": prefix_mib}
    expected = run_staggered(make_engine(kind, **settings), work, caches=caches)
    engine = make_engine(kind, **settings)
    # Who begins anew must get some steps in which nobody is set aside.
    assert run_staggered(engine, work, caches=caches, moves=0.5 if prefix_mib else 0.15) == expected
    kept, dropped = counts(engine)
    assert kept > 3 if prefix_mib else dropped > 3 and not kept


def test_texts_and_log_probabilities_come_once():
    """What is computed anew is not sent again."""
    prompt, params = prompts(1, seed=8)[0], SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
    found = []
    for prefix_mib, moves in ((256, 0.0), (256, 0.6), (0, 0.2)):
        engine, draw, deltas = make_engine(prefix_mib=prefix_mib), random.Random(4), []
        engine.add_request("a", prompt, params)
        while engine.has_work():
            if draw.random() < moves:
                set_one_aside(engine, draw)
            deltas += engine.step()
        tokens = [entry.token for delta in deltas for entry in delta.logprobs]
        found.append(("".join(delta.text for delta in deltas), tokens, deltas[-1].tokens, deltas[-1].cached_tokens))
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) == 12


def test_an_urgent_request_takes_the_slot_of_another():
    expected = {name: make_engine().generate([prompt], greedy(8))[0].tokens for name, prompt in
                zip(("usual", "urgent"), prompts(2, seed=5), strict=True)}  # fmt: skip
    engine = make_engine(max_num_seqs=1)
    ended, requests = [], {}
    for name, prompt in zip(("usual", "urgent"), prompts(2, seed=5), strict=True):
        urgency = Urgency(priority=-1 if name == "urgent" else 0)
        requests[name] = engine.add_request(name, prompt, greedy(8), urgency=urgency)
        for _ in range(4):
            engine.step()
    while engine.has_work():
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended == ["urgent", "usual"]
    assert {name: request.generated for name, request in requests.items()} == expected
    assert_empty(engine)


def test_nobody_makes_way_for_a_request_that_is_no_more_urgent():
    engine = make_engine(max_num_seqs=1)
    for name in ("first", "second"):
        engine.add_request(name, [5, 6, 7], greedy(8), urgency=Urgency(priority=3))
    ended = []
    while engine.has_work():
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended == ["first", "second"]
    assert counts(engine) == (0, 0)


@pytest.mark.parametrize("prefix_mib", [256, 0], ids=["kept", "read anew"])
def test_sequences_that_grow_beyond_memory_make_way(prefix_mib, monkeypatch):
    """Memory is counted a few tokens ahead, not for all that may come: more start, and the budget holds."""
    monkeypatch.setattr("serve.preemption.AHEAD", 8)
    monkeypatch.setattr("serve.engine.AHEAD", 8)
    model = small_model("mha", dim=256, layers=2, max_len=256)

    def engine_with(**settings):
        settings = {"max_batched_tokens": 64, "max_num_seqs": 8, "prefix_mib": prefix_mib, **settings}
        return Engine(EngineConfig(checkpoint="none", **settings), model=model, tokenizer=tokenizer())

    work = [(prompt, greedy(120)) for prompt in prompts(6, seed=2)]
    expected = run_staggered(engine_with(), work)
    engine = engine_with(cache_mib=2)
    assert engine.runner.full.row_bytes(140) > engine.scheduler.capacity.nbytes / 6
    requests = [engine.add_request(str(index), *one) for index, one in enumerate(work)]
    most_running = 0
    while engine.has_work():
        engine.step()
        most_running = max(most_running, engine.scheduler.num_running)
        assert engine.runner.full.nbytes - engine.runner.full._elastic.always <= 2 << 20
    assert [request.generated for request in requests] == expected
    assert most_running == 6
    assert sum(counts(engine)) > 0
    assert_empty(engine)


def test_who_runs_alone_is_not_set_aside():
    engine = make_engine(max_num_seqs=1)
    (plan,) = WISH.plans(engine.model, engine.tokenizer, [[5, 6, 7]], [6])
    engine.add_request("reads", [5, 6, 7], greedy(6), plan=plan)
    engine.step()
    engine.add_request("urgent", [5, 6, 7], greedy(2), urgency=Urgency(priority=-5))
    ended = []
    while engine.has_work():
        ended += [delta.request_id for delta in engine.step() if delta.finish_reason]
    assert ended == ["reads", "urgent"]


def test_a_state_that_cannot_be_copied_is_computed_anew(monkeypatch):
    expected = make_engine().generate([[5, 6, 7]], greedy(8))[0].tokens
    engine, fault = make_engine(), Fault()
    request = engine.add_request("a", [5, 6, 7], greedy(8))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(engine.runner.full, "copy", lambda slot: fault.fire())
    engine.preemption.set_aside(engine.scheduler, request)
    assert fault.fired
    while engine.has_work():
        engine.step()
    assert request.generated == expected
    assert_empty(engine)


@pytest.mark.parametrize("cache", [{"policy": "full"}, D2O], ids=["full", "d2o"])
def test_a_state_that_cannot_be_put_back_fails_alone(cache, monkeypatch):
    engine, fault = make_engine(cache_bounds={"full": None, "d2o": None}), Fault()
    choice = engine.choose_cache(cache)
    other = engine.add_request("other", [9, 8, 7], greedy(8), cache=choice)
    request = engine.add_request("a", [5, 6, 7], greedy(8), cache=choice)
    for _ in range(3):
        engine.step()
    engine.preemption.set_aside(engine.scheduler, request)
    pool = engine.runner._pool(choice)
    monkeypatch.setattr(pool, "put", lambda *_: fault.fire())
    ended = {}
    while engine.has_work():
        ended |= {delta.request_id: delta.finish_reason for delta in engine.step() if delta.finish_reason}
    assert ended == {"a": "error", "other": "length"}
    assert len(other.generated) == 8
    assert_empty(engine)


def test_an_abort_frees_what_was_set_aside():
    engine = make_engine()
    request = engine.add_request("a", [5, 6, 7], greedy(8))
    for _ in range(3):
        engine.step()
    engine.preemption.set_aside(engine.scheduler, request)
    assert engine.prefixes.tree.lent == request.aside.nbytes() > 0
    assert engine.abort("a")
    assert_empty(engine)


def test_a_deadline_ends_a_request_with_what_there_is():
    engine = make_engine(max_num_seqs=1)
    late = engine.add_request(
        "late", [5, 6, 7], greedy(50), arrived=time.perf_counter(), urgency=Urgency(deadline_s=60)
    )
    engine.add_request("waits", [5, 6, 7], greedy(50), urgency=Urgency(deadline_s=60))
    engine.add_request("usual", [5, 6, 7], greedy(3))
    deltas = [delta for _ in range(4) for delta in engine.step()]
    for request_id in ("late", "waits"):
        engine._requests[request_id].arrived -= 60
    generated = len(late.generated)
    while engine.has_work():
        deltas += engine.step()
    last = {delta.request_id: delta for delta in deltas if delta.finish_reason}
    assert {name: delta.finish_reason for name, delta in last.items()} == {
        "late": "deadline", "waits": "deadline", "usual": "length"
    }  # fmt: skip
    assert last["late"].tokens == generated >= 2
    assert (last["waits"].tokens, last["waits"].ttft_s, last["waits"].kv_bytes) == (0, 0.0, 0)
    assert last["late"].kv_bytes > 0
    assert_empty(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 1.5}, "priority=1.5 must be a whole number"),
        ({"priority": True}, "priority=True must be a whole number"),
        ({"priority": 1001}, "priority=1001 must lie between -1000 and 1000"),
        ({"deadline_s": 0}, "deadline_s=0 must be greater than 0"),
        ({"deadline_s": float("nan")}, "deadline_s=nan must be greater than 0"),
        ({"deadline_s": "5"}, "deadline_s='5' must be a number"),
    ],
)
def test_urgencies_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Urgency(**options)


def test_a_deadline_while_tokens_are_given_once_more_counts_them_all():
    engine = make_engine(prefix_mib=0)
    request = engine.add_request("a", [5, 6, 7], greedy(50), urgency=Urgency(deadline_s=60))
    deltas = [delta for _ in range(10) for delta in engine.step()]
    engine.preemption.set_aside(engine.scheduler, request)
    for _ in range(4):
        deltas += engine.step()
    assert len(request.generated) < deltas[-1].tokens == 10
    request.arrived -= 60
    (last,) = engine.step()
    assert (last.finish_reason, last.tokens) == ("deadline", 10)
    assert_empty(engine)


def test_a_prompt_that_is_read_anew_counts_what_was_copied_once():
    engine = make_engine(prefix_cell=5)
    beginning = [7] * 20
    engine.generate([[*beginning, 9]], greedy(1))
    request = engine.add_request("a", [*beginning, *range(30, 55)], greedy(2))
    for _ in range(2):
        engine.step()
    assert not request.generated
    engine.preemption.set_aside(engine.scheduler, request)
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    assert deltas[-1].cached_tokens == 20
    assert request.generated == make_engine(prefix_mib=0).generate([list(request.prompt)], greedy(2))[0].tokens
    assert_empty(engine)
