"""Requests that read and edit attention: replies, downloads, and the requests beside them, over HTTP and in the
engine."""

import asyncio
import gc
import io
import weakref

import httpx
import numpy as np
import pytest

from attnzoo.attention.edits import Add, EditRun, Edits
from attnzoo.generation import AttentionWish
from attnzoo.language_model import LanguageModel
from serve.request import CacheMemoryError, Delta
from tests.helpers.engines import D2O, SECRET, Fault, assert_empty, greedy, make_engine, prompts
from tests.helpers.http_server import MODEL, events, open_request, post, running, wait_until
from tests.helpers.serving import chat_tokenizer, tokenizer

TEXT = "The slots of the state are numbered"
EDITS = [
    {"scale": {"where": {"keys": "word"}, "factor": 4.0}},
    {"hide": {"where": {"layers": 0, "queries": -1, "keys": 0}}},
]
READ = [{"mass": {"bins": {"word": "word", "first": 0}}}, {"map": {"where": {"layers": 1, "heads": [0, 3]}}}]
ATTENTION = {"edits": EDITS, "read": READ, "spans": {"word": "state"}}
MAP = {"read": [{"map": {}}]}


def generate(url, **fields) -> httpx.Response:
    return post(url, **{"prompt": TEXT, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **fields})


def map_bytes(url: str) -> float:
    """Bytes of maps that the server reserves and keeps."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("attnzoo_attention_map_bytes ")))


def without_place(attention: dict) -> dict:
    """What does not differ from answer to answer."""
    for entry in attention["read"]:
        for name in ("id", "url", "expires_at"):
            (entry["map"] or {}).pop(name, None)
    return attention


@pytest.fixture(scope="module")
def server():
    with running("rcmha", words=chat_tokenizer(), attention="edit", attention_max_bytes=1 << 16) as (url, owner):
        yield url, owner


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.mark.parametrize("cache", [None, D2O], ids=["full", "d2o"])
def test_a_reply_is_that_of_the_library(server, cache):
    """Text, reductions and maps; and a stream has them once, with its last chunk. Kills: decode without edits; a read
    that begins after the prompt; the run of another choice."""
    url, owner = server
    lm = LanguageModel(owner.engine.model, tokenizer())
    options = {"edits": Edits.from_json(EDITS), "read": Edits.from_json(READ), "spans": {"word": "state"}}
    expected = lm.generate(TEXT, max_new_tokens=8, ignore_eos=True, cache=cache, **options)
    fields = {"attention": ATTENTION} | ({} if cache is None else {"cache": cache})
    answer = generate(url, **fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["text"] == expected.text
    assert choice["text"] != generate(url).json()["choices"][0]["text"]
    total = expected.prompt_tokens + 7
    mass, other_mass, read_map = choice["attention"]["read"]
    assert [(e["read"], e["kind"], e["layer"]) for e in (mass, other_mass, read_map)] == [
        (0, "mass", 0), (0, "mass", 1), (1, "map", 1)
    ]  # fmt: skip
    for entry in (mass, other_mass):
        assert (entry["heads"], entry["queries"]) == ([0, 1, 2, 3], [[0, total]])
        for name, values in expected.reading[entry["layer"]].mass.items():
            np.testing.assert_allclose(entry["values"][name], values, rtol=1e-4, atol=1e-5)
    layer = choice["attention"]["layers"][1]
    assert layer["evicted"] == expected.reading[1].evicted.sum(1).tolist()
    assert any(layer["evicted"]) == (cache is not None)
    assert read_map["map"]["shape"] == [2, total, total]
    found = httpx.get(url + read_map["map"]["url"])
    assert len(found.content) == read_map["map"]["bytes"]
    values = np.load(io.BytesIO(found.content))
    assert values.dtype == np.float16
    np.testing.assert_allclose(values, expected.reading[1].map, rtol=1e-2, atol=1e-3)
    chunks = events(generate(url, stream=True, **fields).text)
    assert [("attention" in chunk["choices"][0]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    streamed = chunks[-1]["choices"][0]["attention"]
    again = httpx.get(url + streamed["read"][2]["map"]["url"])
    assert again.content == found.content
    assert without_place(streamed) == without_place(choice["attention"])
    assert "attention" not in generate(url).json()["choices"][0]


def test_chats_and_several_choices_read_each_for_itself(url):
    messages = [{"role": "user", "content": "a state of the slots"}]
    body = {"model": MODEL, "messages": messages, "temperature": 30.0, "seed": 3, "max_tokens": 5, "n": 3}
    body |= {"attention": ATTENTION, "ignore_eos": True}
    whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["choices"]
    texts = [choice["message"]["content"] for choice in whole]
    assert len(set(texts)) == 3
    alone = httpx.post(f"{url}/v1/chat/completions", json={**body, "n": 1}, timeout=30).json()["choices"]
    assert alone[0]["message"]["content"] == texts[0]
    maps = []
    for choice in whole:
        entry = choice["attention"]["read"][2]["map"]
        maps.append(np.load(io.BytesIO(httpx.get(url + entry["url"]).content)))
    asked = len(maps[0][0]) - 4
    np.testing.assert_allclose(maps[0][:, :asked], maps[1][:, :asked], rtol=1e-2, atol=1e-3)  # each reads the prompt
    assert not np.allclose(maps[0][:, asked:], maps[1][:, asked:], atol=1e-2)
    named = {**body, "n": 1, "attention": {"read": [{"mass": {"bins": {"asked": "user", "same": "messages[0]"}}}]}}
    values = httpx.post(f"{url}/v1/chat/completions", json=named, timeout=30).json()["choices"][0]["attention"]["read"]
    assert values[0]["values"]["asked"] == values[0]["values"]["same"]
    assert max(values[0]["values"]["asked"][0]) > 0.01
    chunks = events(httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=30).text)
    ends = [chunk["choices"][0] for chunk in chunks if "attention" in chunk["choices"][0]]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]
    assert all(end["finish_reason"] == "length" and end["delta"] == {} for end in ends)


def test_no_choice_is_lost_that_ends_while_another_is_written(url, monkeypatch):
    """The loop of events waits while maps are written. Kills: a stream that ends when all deltas have come, and not
    when all are sent."""
    seen = []

    async def slowly(size, work, *arguments):
        seen.append(arguments)
        await asyncio.sleep(1.0 if len(seen) == 1 else 0.0)
        return work(*arguments)

    monkeypatch.setattr("serve.openai.readings.in_thread", slowly)
    chunks = events(generate(url, attention=ATTENTION, n=3, stream=True).text)
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"] == "length"]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]
    assert all("attention" in end for end in ends)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ([], "attention must be an object such as"),
        ({"edit": []}, "attention: unknown field 'edit'; did you mean 'edits'"),
        ({"read": [{"mass": {"where": {"layers": 2}}}]}, "read[0].mass.where.layers=2 is out of range: there are 2"),
        ({**ATTENTION, "read": [READ[0], {"mass": {"where": {"heads": 4}}}]}, "read[1].mass.where.heads=4 is out of"),
        ({"read": READ}, "read[0].mass.word: no span is called 'word'"),
        ({**ATTENTION, "spans": {"word": "dog"}}, "spans['word']='dog' does not stand in the prompt"),
        ({**ATTENTION, "spans": {"word": [3, 300]}}, "must be [start, stop) within the"),
        ({"edits": [{"hide": {"where": {"queries": 200}}}]}, "it must lie within the sequence's"),
        ({"edits": [{"put_weights": {"where": {}, "weights": [[[1.0]]]}}]}, "put_weights.weights has shape [1, 1, 1]"),
        ({"edits": [{"hide": {"where": {"keys": {"sinks": {"channels": [32], "tau": 2}}}}}]}, "no such channels"),
        ({"read": [{"map": {"dtype": "fp64"}}, {"map": {"dtype": "fp64"}}]}, "above this server's limit of 65,536"),
        ({"read": [{"entropy": {}}] * 20}, "reads in the answer take up to"),
    ],
    ids=str,
)  # fmt: skip
def test_all_that_is_wrong_is_refused_before_the_first_byte(url, attention, message):
    for stream in (False, True):
        answer = generate(url, attention=attention, stream=stream, max_tokens=10)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "attention")
        assert message in answer.json()["error"]["message"]
    assert map_bytes(url) == 0 or "attention_total" not in message


def test_the_bound_of_bytes_is_that_of_what_is_returned(server):
    """One byte less than the server's limit is read; copies count."""
    _, owner = server
    tokens = len(owner.engine.encode(TEXT))
    fields = {"max_tokens": 1, "attention": {"read": [{"map": {"where": {"layers": 0, "heads": 0}}}]}}
    each = 128 + 2 * tokens * tokens
    with running(attention="read", attention_max_bytes=2 * each, attention_total_bytes=2 * each) as (small, _):
        assert generate(small, n=2, **fields).status_code == 200
        answer = generate(small, n=3, **fields)
        assert answer.status_code == 400
        assert (
            f"return {3 * each:,} bytes, above this server's limit of {2 * each:,}" in answer.json()["error"]["message"]
        )
        full = generate(small, **fields)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "maps_full")
        assert 1 <= int(full.headers["retry-after"]) <= 300
        assert generate(small, attention={"read": [{"mass": {"where": {"keys": 0}}}]}).status_code == 200


def test_a_map_ends_with_its_time(server):
    with running(attention="read", attention_ttl_s=0.4) as (url, _):
        choice = generate(url, attention=MAP).json()["choices"][0]
        found = choice["attention"]["read"][0]["map"]
        assert map_bytes(url) >= 2 * found["bytes"]
        assert httpx.head(url + found["url"]).headers["content-length"] == str(found["bytes"])
        wait_until(lambda: map_bytes(url) == 0, "expired")
        gone = httpx.get(url + found["url"])
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "attention_map_not_found")


def test_it_is_off_unless_the_server_says_so(monkeypatch, url):
    with running() as (plain, _):
        answer = generate(plain, attention=MAP)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")
        assert "attention is turned off on this server" in answer.json()["error"]["message"]
        assert generate(plain, attention=None).status_code == 200
        assert httpx.get(f"{plain}/v1/models").json()["data"][0]["attention"]["allowed"] == "off"
    monkeypatch.setenv("SOME_KEY", "secret")
    with running("mixed", attention="read", api_key_env="SOME_KEY") as (guarded, _):
        assert httpx.get(f"{guarded}/v1/attention/x").status_code == 401
        key = {"authorization": "Bearer secret"}
        assert httpx.get(f"{guarded}/v1/attention/x", headers=key).status_code == 404
        layers = httpx.get(f"{guarded}/v1/models", headers=key).json()["data"][0]["attention"]["layers"]
        assert [(x["heads"], x["reads"], x["scores"], x["weights"]) for x in layers] == [
            (4, True, True, True), (4, False, False, False)
        ]  # fmt: skip
        assert "no softmax" in layers[1]["why_not"]
        body = {"model": MODEL, "prompt": TEXT, "attention": {"edits": EDITS, "spans": {"word": "state"}}}
        answer = httpx.post(f"{guarded}/v1/completions", json=body, headers=key)
        assert "can be read, not edited" in answer.json()["error"]["message"]
        answer = httpx.post(f"{guarded}/v1/completions", json={**body, "attention": MAP}, headers=key)
        assert "layer 1 (Linear) cannot be read in extend" in answer.json()["error"]["message"]
    card = httpx.get(f"{url}/v1/models/{MODEL}").json()["attention"]
    assert (card["allowed"], card["max_bytes"], len(card["layers"])) == ("edit", 1 << 16, 2)


def test_cancelled_and_failed_requests_leave_no_maps_and_no_text(monkeypatch, caplog):
    with caplog.at_level("INFO"), running(attention="edit", delay_s=0.01) as (url, owner):
        fields = {"prompt": "HIDDEN state", "max_tokens": 60, "attention": {**ATTENTION, **MAP}}
        for stream in (False, True):
            connection = open_request(url, stream=stream, **fields)
            wait_until(lambda: map_bytes(url) > 0 and owner.engine.runner.compact, "running")
            connection.close()
            wait_until(lambda: map_bytes(url) == 0 and not owner.engine.runner.compact, "left")
        fault, inner = Fault(), Add.apply
        changes = {7: lambda x: fault.fire(), 8: lambda x: x * float("nan")}
        monkeypatch.setattr(
            Add, "apply", lambda self, x, here: changes.get(self.value, lambda x: inner(self, x, here))(x)
        )
        bad = {**fields, "attention": {**MAP, "edits": [{"add": {"where": {"queries": "generated"}, "value": 7}}]}}
        answer = generate(url, **bad)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_failed")
        assert SECRET in answer.json()["error"]["message"]
        bad["attention"]["edits"] = [{"add": {"where": {}, "value": 8}}]  # as numbers that overflow in the model
        error = generate(url, **bad)
        assert (error.status_code, error.json()["error"]["param"]) == (400, "attention")
        assert error.json()["error"]["message"].startswith("attention.edits: the model's logits are not finite numbers")
        assert map_bytes(url) == 0
        assert generate(url, attention=ATTENTION).status_code == 200
    assert "failed" in caplog.text
    assert "HIDDEN" not in caplog.text
    assert SECRET not in caplog.text


WISH = AttentionWish(Edits.from_json([{"add": {"where": {"keys": 0}, "value": 3.0}}]), Edits.from_json([{"map": {}}]))


def outcome(engine, work, cache=None, edited=(), aborted=None) -> dict[str, list[Delta]]:
    """The deltas of requests that run together; those in `edited` change their attention, `aborted` is ended early."""
    found: dict[str, list[Delta]] = {}
    for index, prompt in work.items():
        params, plan = greedy(6 + index % 3, logprobs=3), None
        if index in edited:
            (plan,) = WISH.plans(engine.model, engine.tokenizer, [prompt], [params.max_tokens])
        choice = engine.choose_cache(cache)
        engine.add_request(str(index), prompt, params, cache=choice, plan=plan)
        found[str(index)] = []
    for step in range(1000):
        if step == 3 and aborted is not None:
            assert engine.abort(str(aborted))
        if not engine.has_work():
            break
        for delta in engine.step():
            found[delta.request_id].append(delta)
    assert_empty(engine)
    assert engine.runner.compact == {}
    assert not engine._requests
    return found


def bits(deltas: list[Delta]) -> list:
    """Texts and log probabilities, to the last bit."""
    return [(delta.text, delta.logprobs, delta.finish_reason, delta.kept_tokens) for delta in deltas]


@pytest.mark.parametrize("cache", [None, D2O], ids=["full", "d2o"])
@pytest.mark.parametrize("fate", ["all end", "one is aborted", "one raises"])
def test_neighbours_compute_what_they_compute_without_the_edited(cache, fate, monkeypatch, caplog):
    """Of 8 requests 4 edit: the other 4 are bit-equal to a run without these, and the edited to each alone. Kills:
    edited rows in the others' batch; the run of a neighbour; a failure that ends its group."""
    settings = {"max_num_seqs": 8, "max_batched_tokens": 512, "max_caches": 5, "itl_target_ms": None}
    settings["cache_bounds"] = {"full": None, "d2o": None}
    work = dict(enumerate(prompts(8, seed=5)))
    edited = [0, 3, 4, 7]
    plain = outcome(make_engine("rcmha", **settings), {i: work[i] for i in work if i not in edited}, cache)
    alone = {str(i): outcome(make_engine("rcmha", **settings), {i: work[i]}, cache, edited)[str(i)] for i in edited}
    unedited = outcome(make_engine("rcmha", **settings), work, cache)
    engine = make_engine("rcmha", **settings)
    fault, inner, calls = Fault(), Add.apply, iter(range(10_000))
    with monkeypatch.context() as patch:
        if fate == "one raises":
            third = lambda self, x, here: fault.fire() if next(calls) == 30 else inner(self, x, here)  # noqa: E731
            patch.setattr(Add, "apply", third)
        found = outcome(engine, work, cache, edited, aborted=3 if fate == "one is aborted" else None)
    assert {r: bits(found[r]) for r in plain} == {r: bits(plain[r]) for r in plain}
    ended = [r for r in alone if found[r] and found[r][-1].finish_reason == "length"]
    assert len(ended) == (4 if fate == "all end" else 3)
    for r in ended:
        assert bits(found[r]) == bits(alone[r])
        assert bits(found[r]) != bits(unedited[r])
        run = found[r][-1].run
        assert run.reading[1].map.equal(alone[r][-1].run.reading[1].map)
        assert len(run.reading[1].map[0]) == len(work[int(r)]) + len(found[r]) - 1 == run.plan.total
    assert all(found[r][-1].run is None for r in plain)
    assert fault.fired == (fate == "one raises")
    assert SECRET not in caplog.text
    assert {r: bits(x) for r, x in outcome(engine, work, cache).items()} == {r: bits(x) for r, x in unedited.items()}


def test_in_small_steps_with_waiting_texts_stay_and_runs_are_let_go():
    """Fewer slots than requests and prompts in pieces; at most `max_caches` edited ones run at a time."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 9, "max_caches": 2}
    work = dict(enumerate(prompts(9, seed=6)))
    edited = [1, 2, 5, 8]
    plain = outcome(make_engine("rcmha", **settings), work)
    engine = make_engine("rcmha", **settings)
    found = outcome(engine, work, edited=edited)
    texts = {r: "".join(delta.text for delta in found[r]) for r in found}
    for r in found:
        if int(r) not in edited:
            assert texts[r] == "".join(delta.text for delta in plain[r])
    runs = [weakref.ref(found[str(index)][-1].run) for index in edited]
    assert all(isinstance(run(), EditRun) for run in runs)
    del found
    gc.collect()
    assert [run() for run in runs] == [None] * 4
    largest = 0
    for index in edited:
        (plan,) = WISH.plans(engine.model, engine.tokenizer, [work[index]], [6])
        engine.add_request(str(index), work[index], greedy(6), plan=plan)
    while engine.has_work():
        engine.step()
        largest = max(largest, len(engine.runner.compact))
    assert largest == 2


def test_memory_of_an_edited_request_counts():
    """A full cache of its own beside the slots is bounded by `cache_mib`, and freed."""
    engine = make_engine("rcmha", cache_mib=1, max_num_seqs=2)
    before = engine.runner.pool_bytes
    (plan,) = WISH.plans(engine.model, engine.tokenizer, [[5, 6, 7]], [9])
    engine.add_request("0", [5, 6, 7], greedy(9), plan=plan)
    engine.step()
    assert engine.runner.pool_bytes - before == engine.runner.full_bytes(12)
    while engine.has_work():
        engine.step()
    assert engine.runner.pool_bytes == before
    engine.admission.max_bytes = engine.runner.full_bytes(12)
    engine.check([5, 6, 7], greedy(9), alone=True)  # to the byte: not the pages of a slot, which it does not take
    engine.admission.max_bytes -= 1
    with pytest.raises(CacheMemoryError, match="cache_mib"):
        engine.check([5, 6, 7], greedy(9), alone=True)
