"""Compressed caches in the server: chosen by request, equal to the plain loop, and memory that is really free."""

import re

import httpx
import pytest
import torch

from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderConfig, generate
from serve.caches import CacheRules
from serve.config import EngineConfig, ServeConfig, parse_settings
from serve.engine import Engine
from serve.request import CacheMemoryError, Delta, SamplingParams
from tests.helpers.engines import greedy, make_engine, prompts, run_staggered
from tests.helpers.http_server import MODEL, post, running
from tests.helpers.serving import small_model, tokenizer

CHOICES = [
    {"policy": "full"},
    {"policy": "d2o", "keep_ratio": 0.5, "min_tokens": 0},
    {"policy": "d2o", "max_tokens": 12},
    {"policy": "think", "channel_ratio": 0.5, "window": 4},
    {"policy": "d2o+think", "keep_ratio": 0.6, "min_tokens": 0, "channel_ratio": 0.5, "window": 2},
    {"policy": "snapkv", "max_tokens": 10, "window": 3},
    {"policy": "streaming", "keep_ratio": 0.5, "min_tokens": 0, "sinks": 1},
]
ANY = dict.fromkeys(choice["policy"] for choice in CHOICES)


def build(choice: dict):
    return build_cache(choice["policy"], {key: value for key, value in choice.items() if key != "policy"})


@pytest.mark.parametrize("kind", ["mha", "rmha", "rcmha", "mdha", "mixed"])
def test_every_policy_gives_the_text_of_the_plain_loop_side_by_side(kind):
    engine = make_engine(kind, max_num_seqs=6, cache_bounds=ANY, max_caches=3)
    work, caches = [], []
    for index, prompt in enumerate(prompts(28, seed=4)):
        work.append((prompt, greedy(1 + index % 15)))
        caches.append(CHOICES[index % len(CHOICES)])
    found = run_staggered(engine, work, caches=caches)
    alone = [
        generate(engine.model, [prompt], max_new_tokens=params.max_tokens, cache=build(choice))[0]
        for (prompt, params), choice in zip(work, caches, strict=True)
    ]
    assert found == alone
    exact = [generate(engine.model, [prompt], max_new_tokens=params.max_tokens)[0] for prompt, params in work]
    assert exact != alone, "nothing was compressed"
    assert engine.runner.compact == {}
    assert engine.runner.pool_bytes == engine.runner.full.nbytes


def test_a_row_that_does_not_move_with_its_sequence_is_caught(monkeypatch):
    """The test above must be able to fail."""
    from attnzoo.kvcache.state import State

    work = [(prompt, greedy(2 + index % 9)) for index, prompt in enumerate(prompts(20, seed=4))]
    right = run_staggered(make_engine(cache=CHOICES[1]), work)
    monkeypatch.setattr(State, "keep_rows", lambda self, order: self.rows(slice(0, len(order))))
    assert run_staggered(make_engine(cache=CHOICES[1]), work) != right


def test_memory_is_that_of_what_is_kept_and_goes_with_the_sequence():
    engine = make_engine(
        "mha", max_num_seqs=4, cache={"policy": "streaming", "max_tokens": 10}, max_batched_tokens=64, prefix_cell=8
    )
    assert engine.runner.full is None
    assert engine.runner.pool_bytes == 0
    for index in range(3):
        engine.add_request(str(index), [5 + index] * 40, greedy(3 + index))
    engine.step()
    engine.step()
    row = engine.model.byte_model(build(engine.config.cache)).compressed(40, 3)
    assert engine.runner.pool_bytes == 3 * row
    assert row < engine.model.init_state(1, 40).nbytes() / 2
    done = {delta.request_id: delta for delta in engine.step() if delta.finish_reason}
    assert done["0"].kv_bytes == row
    assert engine.runner.pool_bytes == 2 * row
    storage = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(engine)}
    assert sum(storage.values()) == 2 * row, "views keep the memory of sequences that left"
    assert b"attnzoo_kv_pool_bytes %d" % (2 * row) in engine.render_metrics().replace(b".0\n", b"\n")
    while engine.has_work():
        engine.step()
    assert engine.runner.pool_bytes == 0


def _tensors(engine: Engine) -> list[torch.Tensor]:
    return [x for pool in engine.runner.compact.values() for x in pool.state.tensors().values() if x.numel()]


def test_a_prompt_that_is_given_up_frees_its_memory():
    engine = make_engine("mha", max_batched_tokens=9, cache=CHOICES[1])
    engine.add_request("runs", [5] * 5, greedy(30))
    engine.add_request("long", [6] * 50, greedy(3))
    for _ in range(3):
        engine.step()
    (pool,) = engine.runner.compact.values()
    assert pool.rows == len(pool.prompts) == 1
    before = pool.nbytes
    assert engine.abort("long")
    assert pool.nbytes == before - engine.model.init_state(1, 50, cache=build(CHOICES[1])).nbytes()
    alone = generate(engine.model, [[5] * 5], max_new_tokens=30, cache=build(CHOICES[1]))[0]
    tokens = engine._requests["runs"].generated
    while engine.has_work():
        engine.step()
    assert tokens == alone


def test_a_prompt_that_is_compressed_as_it_is_read_never_has_its_full_cache():
    cache = {"policy": "d2o", "max_tokens": 10, "prefill": "stream"}
    engine = make_engine("mha", max_batched_tokens=12, cache=cache)
    engine.add_request("long", [5, 6, 7, 8] * 14, greedy(2))
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, engine.runner.pool_bytes)
    assert most < engine.model.init_state(1, 56).nbytes() / 2


def test_rows_that_are_larger_than_expected_count():
    engine = make_engine(
        "mha", max_num_seqs=4, cache={"policy": "d2o", "max_tokens": 10}, max_batched_tokens=64, prefix_cell=8
    )
    for index in range(3):
        engine.add_request(str(index), [5 + index] * 40, greedy(3))
    engine.step()
    engine.step()
    # Each prompt gives its layers budgets of its own, and a layer's rows are as long as its longest.
    padded = engine.runner.pool_bytes // 3
    assert padded > engine.model.byte_model(build(engine.config.cache)).compressed(40, 3)
    prompt = engine.model.init_state(1, 40, cache=build(engine.config.cache)).nbytes()
    engine.add_request("one more", [5] * 40, greedy(3))
    *running, one_more = engine.scheduler._entries.values()
    assert engine.scheduler.capacity.taken([*running, one_more], [one_more]) == 4 * padded + prompt


def test_requests_wait_for_room_in_memory():
    model = small_model("mha", dim=256, layers=4, max_len=512)
    cache = {"policy": "snapkv", "keep_ratio": 0.25, "window": 8}
    config = EngineConfig(checkpoint="none", max_num_seqs=8, cache=cache, cache_mib=6)
    engine = Engine(config, model=model, tokenizer=tokenizer())
    whole = model.init_state(1, 400, cache=build(cache)).nbytes()
    row = model.byte_model(build(cache)).compressed(400, 20)
    assert row < whole / 2
    fit = ((6 << 20) - whole) // row
    assert 1 < fit < 8
    for index in range(8):
        engine.add_request(str(index), [5 + index] * 400, greedy(20))
    together = 0
    while engine.has_work():
        engine.step()
        together = max(together, engine.scheduler.num_running)
        assert engine.runner.pool_bytes <= 6 << 20
    assert together == fit
    with pytest.raises(CacheMemoryError, match=r"needs .* MiB, and there are cache_mib=1; shorten"):
        Engine(
            EngineConfig(checkpoint="none", cache=cache, cache_mib=1), model=model, tokenizer=tokenizer()
        ).add_request("a", [5] * 400, greedy(20))


def test_streams_with_other_caches_keep_no_plain_request_waiting():
    engine = make_engine("mha", max_num_seqs=8, max_caches=4)
    for index, choice in enumerate(CHOICES[1:6]):
        engine.add_request(str(index), [5 + index] * 3, greedy(40), cache=engine.choose_cache(choice))
    engine.step()
    engine.add_request("plain", [5, 6], greedy(2))
    said = {delta.request_id for _ in range(2) for delta in engine.step()}
    assert "plain" in said
    assert "4" not in said, "more choices than max_caches run"
    while engine.has_work():
        engine.step()
    assert engine.runner.compact == {}


def test_a_model_says_how_its_cache_is_kept_and_a_server_knows_better():
    model = small_model("mha")
    model.config = DecoderConfig.from_dict({**model.config.to_dict(), "cache": CHOICES[1]})
    engine = Engine(EngineConfig(checkpoint="none"), model=model, tokenizer=tokenizer())
    assert engine.caches.default.policy == "d2o"
    assert engine.runner.full is None
    engine = Engine(EngineConfig(checkpoint="none", cache={"policy": "full"}), model=model, tokenizer=tokenizer())
    assert engine.caches.default.exact
    with pytest.raises(ValueError, match="unknown cache policy"):
        DecoderConfig.from_dict({**model.config.to_dict(), "cache": {"policy": "d20"}})


def test_models_without_such_a_cache_say_so():
    engine = make_engine("linear")
    with pytest.raises(ValueError, match="constant"):
        engine.choose_cache({"policy": "d2o"})
    with pytest.raises(ValueError, match="window"):
        make_engine("window", cache={"policy": "d2o"})
    with pytest.raises(ValueError, match="cannot be compiled for ThinKCache, whose state grows"):
        make_engine("mha", cache={"policy": "think"}, compile_decode=True)


RULES = CacheRules(
    {"policy": "d2o", "keep_ratio": 0.2}, {"d2o": {"keep_ratio": [0.1, 0.5], "prefill": ["stream"]}, "streaming": None}
)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "cache.policy is missing: name one of"),
        ({"policy": "d20"}, "cache.policy='d20' is not known; did you mean 'd2o'"),
        ({"policy": "d2o", "keep": 0.2}, "unknown key cache.d2o.keep; did you mean 'keep_ratio'"),
        ({"policy": "d2o", "keep_ratio": 1.2}, "keep_ratio=1.2 is the part that is kept"),
        ({"policy": "d2o", "keep_ratio": "a"}, "cache.d2o.keep_ratio='a' has type str"),
        ({"policy": "full"}, "cache.policy='full' is not allowed here; choose one of d2o, streaming"),
        ({"policy": "think"}, "cache.policy='think' is not allowed here"),
        (
            {"policy": "d2o", "keep_ratio": 0.6, "prefill": "stream"},
            "cache.keep_ratio=0.6 is not allowed here; give a number between 0.1 and 0.5",
        ),
        ({"policy": "d2o", "max_tokens": 99999, "prefill": "stream"}, "cache.keep_ratio=None is not allowed here"),
        ({"policy": "d2o", "keep_ratio": 0.3}, "cache.prefill='oneshot' is not allowed here; give one of 'stream'"),
    ],
)
def test_what_a_request_may_not_ask(asked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RULES.choose(asked)


def test_what_a_request_may_ask():
    assert RULES.choose(None) == RULES.choose({"policy": "d2o", "keep_ratio": 0.2}) == RULES.default
    assert RULES.choose({"policy": "streaming", "max_tokens": 9}).config.max_tokens == 9
    assert RULES.choose({"policy": "d2o", "keep_ratio": 0.5, "prefill": "stream"}).config.keep_ratio == 0.5
    free = CacheRules(None, None)
    assert free.choose({"policy": "full"}) == free.default
    assert free.choose({"policy": "think"}).policy == "think"
    closed = CacheRules({"policy": "d2o"}, None)
    assert not closed.exact
    with pytest.raises(ValueError, match="'full' is not allowed"):
        closed.choose({"policy": "full"})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"d20": {}}, "cache_bounds.d20: no such cache policy"),
        ({"d2o": {"keep": [0, 1]}}, "cache_bounds.d2o.keep is no option of d2o; did you mean 'keep_ratio'"),
        ({"full": {"keep": [0, 1]}}, "cache_bounds.full.keep is no option of full; there are none"),
        ({"d2o": {"keep_ratio": 0.5}}, "cache_bounds.d2o.keep_ratio=0.5 must be a list"),
        ({"d2o": {"keep_ratio": [0.5, 0.1]}}, "must be [least, most] with least <= most"),
        ({"d2o": [0.1]}, "must be a mapping of options"),
    ],
)
def test_bounds_that_make_no_sense(bounds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig(checkpoint="none", cache_bounds=bounds)


def test_settings_on_the_command_line():
    values = parse_settings(["cache={policy: d2o, keep_ratio: 0.3}", "cache_bounds={d2o: {keep_ratio: [0.1, 0.4]}}"])
    config = ServeConfig(checkpoint="none", **values)
    assert config.cache == {"policy": "d2o", "keep_ratio": 0.3}
    with pytest.raises(ValueError, match=r"unknown key cache\.d2o\.ratio"):
        ServeConfig(checkpoint="none", cache={"policy": "d2o", "ratio": 0.3})


@pytest.fixture(scope="module")
def server():
    with running("rcmha") as (url, owner):
        yield url, owner


def test_a_request_chooses_its_cache_over_http(server):
    url, owner = server
    prompt = list(range(10, 210))
    used = {}
    for choice in CHOICES:
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True, "cache": choice}
        answer = post(url, **body).json()
        tokens = generate(owner.engine.model, [prompt], max_new_tokens=12, cache=build(choice))[0]
        assert answer["choices"][0]["text"] == tokenizer().decode(tokens)
        used[str(choice)] = answer["usage"]["attnzoo"]["kv_bytes"]
        if choice["policy"] != "full":
            # Pages are allocated whole, and count as far as they are filled.
            assert used[str(choice)] <= owner.engine.model.byte_model(build(choice)).compressed(200, 11)
    assert all(used[str(choice)] < 0.78 * used[str(CHOICES[0])] for choice in CHOICES[1:])
    assert used[str(CHOICES[1])] < 0.65 * used[str(CHOICES[0])]


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("d2o", 'cache must be an object such as {"policy": "d2o", "keep_ratio": 0.2}'),
        ({"policy": "d2o", "keep_ratio": 7}, "keep_ratio=7.0 is the part that is kept"),
        ({"policy": "nothing"}, "cache.policy='nothing' is not known"),
    ],
)
def test_a_wrong_cache_is_refused_by_name(server, cache, message):
    answer = post(server[0], cache=cache)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "cache"
    assert message in error["message"]


def test_the_openai_client_passes_it_on(server):
    import openai

    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL,
        prompt=list(range(10, 60)),
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cache": CHOICES[1]},
    )
    assert list(stream)[-1].usage.model_extra["attnzoo"]["kv_bytes"] > 0
    assert httpx.get(f"{server[0]}/health").status_code == 200


def last_of(engine: Engine, prompt: list[int], tokens: int, cache: dict | None) -> Delta:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return engine.generate([prompt], params, cache=cache)[0].last


SHORT = [10, 11, 12]


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (
            {"policy": "d2o", "keep_ratio": 0.9},
            r"d2o\(keep_ratio=0.9\) keeps at least 64 tokens after a prompt of 3, .* 22",
        ),
        ({"policy": "streaming", "keep_ratio": 0.1}, "keeps at least 64 tokens"),
        ({"policy": "snapkv"}, r"snapkv\(\) keeps 64 tokens of a prompt of 3"),
        ({"policy": "think"}, r"think\(\) leaves the newest 32 tokens .* whole, and the prompt has 3"),
        ({"policy": "think", "channel_ratio": 1.0}, r"think\(channel_ratio=1.0\) keeps everything"),
        ({"policy": "d2o", "keep_ratio": 1.0}, r"d2o\(keep_ratio=1.0\) keeps everything"),
    ],
)
def test_a_short_text_is_left_as_it_is_and_says_so(cache, reason):
    engine = make_engine("mha")
    exact = engine.generate([SHORT], greedy(20))[0]
    done = engine.generate([SHORT], greedy(20), cache=cache)[0]
    assert done.tokens == exact.tokens
    assert done.last.policy == cache["policy"]
    assert done.last.kept_tokens == exact.last.kept_tokens == 22
    assert re.search(reason, done.last.not_compressed)
    # What is stored beside keys and values is all there is to come on top, and it is said.
    assert exact.last.kv_bytes <= done.last.kv_bytes < 1.5 * exact.last.kv_bytes
    assert ("more than it saves" in done.last.not_compressed) is (done.last.kv_bytes > exact.last.kv_bytes)
    assert done.last.kv_bytes_full == exact.last.kv_bytes_full == exact.last.kv_bytes
    assert exact.last.not_compressed is None
    assert exact.last.policy == "full"


@pytest.mark.parametrize(
    ("cache", "kept"),
    [
        ({"policy": "d2o", "max_tokens": 20, "budget": "uniform"}, 20),
        ({"policy": "streaming", "max_tokens": 8}, 8),
        ({"policy": "snapkv", "max_tokens": 10, "window": 3}, 14),
        ({"policy": "think", "window": 4}, 54),
        ({"policy": "d2o+think", "max_tokens": 20, "window": 4, "budget": "uniform"}, 20),
    ],
)
def test_what_was_kept_of_a_long_text(cache, kept):
    """A prompt of 50 and four tokens that were read of five: 54."""
    found = last_of(make_engine("mha"), list(range(10, 60)), 5, cache)
    assert found.kept_tokens == kept
    assert found.kv_bytes < found.kv_bytes_full
    assert found.not_compressed is None


def test_bytes_are_a_requests_own():
    """Whoever runs beside it, and however many tokens of a page are free."""
    cache = {"policy": "snapkv", "max_tokens": 10, "window": 3}
    engine = make_engine("mha", cache=cache)
    alone = [last_of(engine, [10 + n] * n, 3, None) for n in (12, 30, 50)]
    together = engine.generate([[10 + n] * n for n in (12, 30, 50)], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [done.last.kv_bytes for done in together] == [one.kv_bytes for one in alone]
    assert [done.last.kv_bytes_full for done in together] == [one.kv_bytes_full for one in alone]
    assert len({one.kv_bytes_full for one in alone}) == 3


def test_a_window_that_costs_more_than_it_saves_says_so():
    found = last_of(make_engine("mha"), list(range(10, 16)), 3, {"policy": "d2o+think", "window": 60})
    assert found.kv_bytes > 3 * found.kv_bytes_full
    assert f"{found.kv_bytes} bytes, and {found.kv_bytes_full} in the full cache" in found.not_compressed


@pytest.mark.parametrize(("kind", "kept"), [("linear", 0), ("mixed", 12), ("window", 9)])
def test_kept_tokens_of_exact_caches(kind, kept):
    found = last_of(make_engine(kind), list(range(10, 20)), 3, None)
    assert (found.kept_tokens, found.kv_bytes) == (kept, found.kv_bytes_full)
