"""Beginnings of prompts that were read before: the same bits as computing them, and the bytes they are said to take."""

import itertools
import random

import pytest
import torch

from attnzoo.kvcache.choice import read_choice
from attnzoo.models.embedded import Embedded, EmbeddedPrompt
from serve.prefix.cache import PrefixCache
from serve.prefix.grid import cut, digests
from serve.prefix.tree import OVERHEAD, PrefixTree
from serve.request import SamplingParams
from tests.helpers.engines import greedy, make_engine, run_staggered
from tests.helpers.serving import small_model

CELL = 8
POLICIES = [
    {"policy": "full"},
    {"policy": "streaming", "max_tokens": 20},
    {"policy": "snapkv", "max_tokens": 20, "window": 4},
    {"policy": "think", "window": 4},
    {"policy": "think", "window": 4, "score": "greedy", "value_channel_ratio": 0.5},
    {"policy": "random_tokens", "max_tokens": 20},
    {"policy": "random_channels"},
    {"policy": "d2o", "max_tokens": 20},
    {"policy": "d2o", "max_tokens": 20, "flavor": "official", "merge_counts": True},
    {"policy": "d2o+think", "max_tokens": 20, "window": 4},
]
KINDS = ["mha", "rmha", "rcmha", "mdha", "linear", "mixed", "window"]


def engine_of(kind, kept, **settings):
    settings = {"prefix_mib": 8 if kept else 0, "prefix_cell": CELL, "max_batched_tokens": 40, **settings}
    return make_engine(kind, **settings)


def said(engine, prompt, cache=None):
    """Tokens and every number that came with them, and how many tokens of the prompt were copied."""
    (out,) = engine.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=20), cache=cache)
    assert out.error is None, out.error
    return (out.tokens, [(each.logprob, each.top) for each in out.logprobs]), out.last.cached_tokens


def conversation(seed, turns=3):
    """Prompts of which each continues the one before, as a client would with some answer between."""
    draw = random.Random(seed)
    tokens = [draw.randrange(3, 400) for _ in range(11)]
    found = []
    for _ in range(turns):
        found.append(list(tokens))
        tokens = tokens + [draw.randrange(3, 400) for _ in range(13)]
    return found


@pytest.mark.parametrize(
    ("kind", "cache"),
    [(kind, None) for kind in KINDS] + [(kind, cache) for kind in ("mha", "rcmha") for cache in POLICIES[1:]],
    ids=str,
)
def test_text_and_numbers_are_the_same_bit_for_bit(kind, cache):
    """Conversations that continue, return, and share a beginning with another, with and without what is kept."""
    first, second = conversation(1), conversation(2)
    work = [*first, *second, first[2][:20] + second[1][:9], first[2][:20] + second[2][:12], first[1], first[2]]
    kept, fresh = engine_of(kind, True), engine_of(kind, False)
    found = [said(kept, prompt, cache) for prompt in work]
    assert [numbers for numbers, _ in found] == [said(fresh, prompt, cache)[0] for prompt in work]
    assert found[0][1] == 0
    assert found[1][1] >= CELL, "the second turn computed what the first had"
    assert found[-1][1] >= 2 * CELL


@pytest.mark.parametrize("length", [CELL - 1, CELL, CELL + 1, 2 * CELL, 2 * CELL + 1])
@pytest.mark.parametrize("kind", ["mha", "rcmha", "linear"])
def test_a_prompt_that_is_sent_twice_computes_its_last_cell(kind, length):
    """The last token is always computed, since it says what comes next."""
    engine = engine_of(kind, True)
    prompt = list(range(5, 5 + length))
    before = said(engine, prompt)
    assert said(engine, prompt) == (before[0], (length - 1) // CELL * CELL)
    assert len(engine.prefixes.tree) == length // CELL, "what the prompt's end has cut is of no other prompt"


@pytest.mark.parametrize("kind", ["mha", "rcmha", "linear", "mixed"])
def test_a_place_where_prompts_part_is_kept_when_it_is_seen_again(kind):
    """Three prompts that part within a cell: the second shows where, the third goes on from there."""
    engine = engine_of(kind, True)
    shared = list(range(5, 25))
    copied = [said(engine, shared + [tail] * 20)[1] for tail in (40, 50, 60)]
    assert copied[2] == 2 * CELL
    assert copied[0] == 0


def test_policies_share_what_they_can_and_sums_are_apart():
    prompt = list(range(5, 45))
    for cache in POLICIES[1:]:
        engine, fresh = engine_of("mha", True), engine_of("mha", False)
        said(engine, prompt)  # by a request with the full cache
        sums = cache["policy"].startswith("d2o")
        assert said(engine, prompt, cache) == (said(fresh, prompt, cache)[0], 0 if sums else 32)
        assert said(engine, prompt, cache)[1] == 32


def test_a_window_of_queries_is_read_whole():
    """A policy that observes the last tokens of a prompt computes at least these."""
    engine = engine_of("mha", True)
    prompt = list(range(5, 45))
    said(engine, prompt)
    cache = {"policy": "snapkv", "max_tokens": 30, "window": 20}
    assert said(engine, prompt, cache) == (said(engine_of("mha", False), prompt, cache)[0], 16)


def test_prompts_shorter_than_a_convolution_is_wide():
    engine, fresh = engine_of("rcmha", True, prefix_cell=1), engine_of("rcmha", False, prefix_cell=1)
    prompt = [5, 6, 7, 8, 9, 10]
    for end in (1, 2, 2, 3, 3, 5, 6):
        assert said(engine, prompt[:end])[0] == said(fresh, prompt[:end])[0]


@pytest.mark.parametrize("kind", ["rcmha", "mixed"])
def test_many_requests_at_once_say_what_each_says_alone(kind):
    """Arriving at random, in eight slots of which rows move, with policies side by side, and too little room."""
    draw = random.Random(3)
    starts = [[draw.randrange(3, 400) for _ in range(24)] for _ in range(3)]
    work = [
        (draw.choice(starts)[: draw.randrange(3, 25)] + [draw.randrange(3, 400)] * draw.randrange(1, 20), greedy(3))
        for _ in range(40)
    ]
    caches = [draw.choice(POLICIES) for _ in work]
    right = run_staggered(engine_of(kind, False), work, caches=caches)
    for budget in (8 << 20, 100_000):
        engine = engine_of(kind, True, max_num_seqs=8)
        engine.prefixes.tree.budget = budget
        assert run_staggered(engine, work, caches=caches) == right
        assert engine.prefixes.reused > 100
        assert engine.prefixes.plans == {}
        assert engine.prefixes.tree.nbytes <= budget


def test_a_system_prompt_that_fifty_requests_share_is_computed_once():
    model_len = 1024 + 64
    model = small_model("rcmha", max_len=model_len)
    engine = engine_of("rcmha", True, prefix_cell=128, max_batched_tokens=512, max_num_seqs=8)
    engine = type(engine)(engine.config, model=model, tokenizer=engine.tokenizer)
    draw = random.Random(0)
    system = [draw.randrange(3, 400) for _ in range(1000)]
    for index in range(50):
        engine.add_request(str(index), [*system, 5 + index, 7, 9], greedy(2))
    read = done = 0
    while engine.has_work():
        deltas = engine.step()
        done += sum(delta.finish_reason == "length" for delta in deltas)
    assert done == 50
    read = 50 * 1003 - engine.prefixes.reused
    own = 50 * (1003 - 896)  # behind the last border of the system prompt
    assert read - own <= 1.1 * 896


@pytest.mark.parametrize("kind", ["mha", "linear"])
def test_requests_that_arrive_together_wait_for_one_that_reads_for_all(kind):
    """There is room for two of them in the first step; the second would read the same as the first."""
    engine = engine_of(kind, True)
    shared = list(range(5, 5 + 3 * CELL))
    for index in range(4):
        engine.add_request(str(index), [*shared, 50 + index, 60], greedy(2))
    while engine.has_work():
        engine.step()
    assert engine.prefixes.reused == 3 * len(shared)


def test_a_turn_ends_a_cell():
    ends = {2}
    prompt = [*range(10, 23), 2, *range(10, 25), 2, 5, 5, 2, 6]
    assert cut(prompt, ends, 8) == (8, 14, 22, 30, 33, 34)
    assert cut([5] * 3 + [2] + [5] * 4, ends, 8) == (4, 8)
    assert cut([2] + [5] * 7, ends, 8) == (8,), "a turn of one token is no pass of its own"
    assert cut([], ends, 8) == ()
    for length in range(1, 40):  # what comes later moves no border
        assert cut(prompt[:length], ends, 8)[:-1] == cut(prompt, ends, 8)[: len(cut(prompt[:length], ends, 8)) - 1]


def test_the_first_turn_always_ends_a_cell():
    """However little is left of it behind a whole cell: conversations go on differently behind a system prompt."""
    system, ends = [*range(10, 28), 2], {2}
    assert cut([*system, *range(30, 50)], ends, 16) == (16, 19, 35, 39)
    assert cut([*system, *range(30, 50)], ends, 64) == (19, 39)
    assert cut([2, *system, 7, 2, *range(30, 50)], ends, 64) == (20, 42), "a start token is no turn"


def test_digests_differ_by_salt_tokens_and_borders():
    prompt = list(range(20))
    keys = digests(prompt, (8, 16, 20), b"a")
    assert len(set(keys)) == 3
    assert digests(prompt[:16], (8, 16), b"a") == keys[:2]
    assert not set(digests(prompt, (8, 16, 20), b"b")) & set(keys)
    assert digests(prompt, (4, 8, 16), b"a")[1] != keys[0]
    assert digests([*prompt[:15], 99], (8, 16), b"a")[1] != keys[1]


def test_what_was_copied_is_not_held_by_the_request():
    """What leaves the tree must leave memory, also while the request that copied it goes on."""
    engine = engine_of("mha", True)
    said(engine, list(range(5, 30)))
    engine.add_request("runs", list(range(5, 30)), greedy(9))
    engine.step()
    assert engine.prefixes.plans["runs"].reused == 3 * CELL
    assert engine.prefixes.plans["runs"].found == {}


def test_two_servers_never_share_a_key():
    model = small_model("mha")
    keys = []
    for _ in range(2):
        cache = PrefixCache(model, 1 << 20, CELL, ())
        cache.add("r", range(20), (8, 16, 20), read_choice({"policy": "full"}))
        keys.append(cache.plans["r"].keys)
    assert not set(keys[0]) & set(keys[1])


def tensors(nbytes):
    return [torch.zeros(nbytes, dtype=torch.uint8)]


def test_what_was_used_long_ago_and_costs_little_goes_first_and_never_before_what_follows_it():
    size = 10_000 + OVERHEAD
    tree = PrefixTree(3 * size)
    dear = tree.put(b"c", None, 8, tensors(10_000), {}, cost=9 * size)
    a = tree.put(b"a", None, 8, tensors(10_000), {}, cost=size)
    b = tree.put(b"b", a, 16, tensors(10_000), {}, cost=size)
    assert tree.nbytes == 3 * size
    tree.put(b"d", None, 8, tensors(10_000), {}, cost=size)
    assert not tree.has(b), "the cheap end of a chain"
    assert tree.has(a)
    assert tree.has(dear)
    tree.put(b"e", None, 8, tensors(10_000), {}, cost=size)
    assert not tree.has(a), "the oldest of those that cost as much"
    assert tree.has(dear)
    assert (len(tree), tree.evicted, tree.nbytes) == (3, 2, 3 * size)
    for number in range(40):  # what is dear goes, too, when all that came later was worth more
        tree.put(b"%d" % number, None, 8, tensors(10_000), {}, cost=size)
    assert not tree.has(dear)


def test_what_has_been_of_use_stays_longer():
    size = 10_000 + OVERHEAD
    tree = PrefixTree(2 * size)
    old, other = (tree.put(key, None, 8, tensors(10_000), {}, cost=size) for key in (b"a", b"b"))
    tree.put(b"c", None, 8, tensors(10_000), {}, cost=size)
    assert not tree.has(old)
    tree.use([other])
    tree.put(b"d", None, 8, tensors(10_000), {}, cost=size)
    assert tree.has(other)


def test_what_does_not_fit_is_not_kept_and_nothing_leaves_for_it():
    tree = PrefixTree(30_000)
    a = tree.put(b"a", None, 8, tensors(10_000), {}, cost=1)
    assert tree.put(b"b", a, 16, tensors(40_000), {}, cost=1) is None
    assert tree.put(b"c", a, 16, tensors(20_000), {}, cost=1) is None, "its own beginning would have to go"
    assert tree.has(a)
    assert tree.nbytes == 10_000 + OVERHEAD


def test_bytes_are_those_of_the_tensors_over_random_traffic():
    draw = random.Random(5)
    engine = engine_of("rcmha", True)
    engine.prefixes.tree.budget = 150_000
    for _ in range(60):
        said(engine, [draw.randrange(3, 12) for _ in range(draw.randrange(2, 50))], draw.choice(POLICIES))
        tree = engine.prefixes.tree
        held = {}
        for node in tree._nodes.values():
            for x in [*node.keys_values, *itertools.chain(*(rest.values() for rest in node.rests.values()))]:
                storage = x.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        assert tree.nbytes == sum(held.values()) + OVERHEAD * len(tree), "views keep more alive than is counted"
        assert tree.nbytes <= 150_000
    assert tree.evicted > 0


def test_a_reason_is_given_where_nothing_can_be_reused():
    engine = engine_of("mha", True)
    prompt = list(range(5, 40))

    def why(prompt, cache=None):
        (out,) = engine.generate([prompt], greedy(1), cache=cache)
        return out.last.not_cached

    assert why(prompt) is None
    assert why(prompt[:8]) == "its first 8 tokens are not followed by enough others"
    assert "compresses a prompt while it is read" in why(
        prompt, {"policy": "d2o", "max_tokens": 9, "prefill": "stream"}
    )
    rows = Embedded(torch.zeros(2, engine.model.config.model_dim))
    assert why(EmbeddedPrompt([prompt, rows])) == "the prompt holds embeddings"
    (out,) = engine_of("mha", False).generate([prompt], greedy(1))
    assert out.last.not_cached == "this server keeps no beginnings of prompts (prefix_mib=0)"


def test_a_failure_to_keep_or_to_copy_ends_nothing_else(monkeypatch):
    prompt = list(range(5, 40))
    engine = engine_of("mha", True)
    right = said(engine, prompt)[0]
    monkeypatch.setattr(engine.prefixes.tree, "use", lambda nodes: 1 / 0)
    outs = engine.generate([prompt, prompt[::-1]], greedy(2))
    assert "ZeroDivisionError" in outs[0].error
    assert outs[1].error is None
    monkeypatch.undo()
    monkeypatch.setattr(engine.prefixes.tree, "put", lambda *given, **named: 1 / 0)
    (out,) = engine.generate([[9, *prompt]], greedy(2))
    assert out.error is None
    monkeypatch.undo()
    assert said(engine, prompt) == (right, 32)
