"""Compiled decode steps: the same function as `extend`, whatever the number of rows and their lengths."""

from functools import reduce
from unittest import mock

import pytest
import torch

from attnzoo.attention.edits import Add, Map, Where
from attnzoo.checkpoint import load_tokenizer
from attnzoo.generation import AttentionWish, Generation
from attnzoo.kvcache import CachePolicy, build_cache
from attnzoo.language_model import LanguageModel
from attnzoo.models import CompiledDecode, DecoderConfig, DecoderLM, pack_weights
from attnzoo.models.compiled import EXPECTED_BATCH, EXPECTED_SLOTS, _example
from attnzoo.models.decoder_lm import DecoderState
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.serving import TOKENS, llama_like, small_model, tokenizer_path


def follow(
    model: DecoderLM, batch: int, lengths: list[int], steps: int, step: CompiledDecode, capacity: int = 160
) -> None:
    """Decodes by both forms from the same prompts and compares hidden states and states."""
    tokens = torch.randint(model.config.vocab_size, (batch, max(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states = []
        for _ in range(2):
            states.append(model.init_state(batch, capacity))
            if max(lengths):
                _, states[-1] = model.extend_hidden(tokens, states[-1], torch.tensor(lengths))
        for new in torch.randint(model.config.vocab_size, (steps, batch, 1)):
            expected, states[0] = model.extend_hidden(new, states[0])
            hidden, same = step(new, states[1])
            assert same is states[1]
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in states[0].tensors().items():
        torch.testing.assert_close(states[1].tensors()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.heavy
def test_the_same_function():
    """Across a bucket's edge (64 slots), for several rows of equal and of unequal lengths, and where what the compiler
    is told to expect are the real numbers of rows and slots. (One row: the engine below, and slow tests.)"""
    model = pack_weights(llama_like())
    step = CompiledDecode(model)
    follow(model, 3, [61, 17, 40], 6, step)
    follow(model, 4, [9, 9, 9, 9], 3, step)
    follow(model, EXPECTED_BATCH, [5] * EXPECTED_BATCH, 1, step, EXPECTED_SLOTS)
    assert step._cut is None, "a state that is gone is kept in memory"


def follow_all(model: DecoderLM, calls: list[tuple[int, int, int]]) -> None:
    """The same compiled step for (sequences, capacity, tokens before it), in that order."""
    step = CompiledDecode(model)
    for batch, capacity, length in calls:
        follow(model, batch, [length] * batch, 1, step, capacity)


BATCH = EXPECTED_BATCH
ORDERS = [
    # First, the hint itself is the real number of slots and the distance between heads; then it is not.
    [(1, EXPECTED_SLOTS, 5), (1, 1, 0), (1, 512, 5), (1, EXPECTED_SLOTS + 1, EXPECTED_SLOTS - 1)],
    [(1, 1, 0), (1, 64, 3), (2, 1, 0), (2, 64, 3), (BATCH, EXPECTED_SLOTS, EXPECTED_SLOTS - 2)],
    [(1, 2048, 1500), (1, 64, 63), (2, 64, 5), (3, 160, 5), (4, EXPECTED_SLOTS, 100), (64, 64, 3), (2, 8, 7)],
    [(BATCH, EXPECTED_SLOTS, 1000), (BATCH - 1, EXPECTED_SLOTS - 1, 5), (BATCH + 1, EXPECTED_SLOTS + 1, 1024)],
    [(64, 64, 5), (2, 64, 5), (64, 128, 100), (8, 8, 7), (4, 4, 3)],
    [(4, 8, 7), (32, 32, 4), (8, EXPECTED_SLOTS, 1023), (1, EXPECTED_SLOTS, 1023), (1, 512, 511), (1, 900, 899)],
]
"""Sequences that are as many as slots, heads, channels or hints, and views of all slots before views of a part."""


@pytest.mark.slow
@pytest.mark.parametrize("calls", ORDERS, ids=lambda calls: "-".join(f"{b}x{c}" for b, c, _ in calls))
def test_every_capacity_and_batch_in_every_order(calls):
    model = small_model("mha", max_len=4096)
    follow_all(model, calls)
    follow_all(model, calls[::-1])


def test_what_is_compiled_for_has_sizes_that_mean_nothing_else():
    model = small_model("mha")
    state = model.init_state(4, 64)
    x, example = _example(torch.zeros(4, 1, 32), state.layers[0])
    keys = example.mixing.keys_BKSH
    batch, heads, slots, width = keys.shape
    capacity = keys.stride(1) // width
    assert (heads, width) == (4, 8)
    assert len({batch, slots, capacity, heads, width, 64, EXPECTED_BATCH, EXPECTED_SLOTS}) == 8
    assert len(x) == len(example.lengths_B) == batch
    assert keys.stride() == (heads * capacity * width, capacity * width, width, 1)


def test_a_state_of_another_policy_is_refused():
    model, token = small_model("mha"), torch.zeros(1, 1, dtype=torch.long)
    one, other = (build_cache("streaming", {"max_tokens": count}) for count in (12, 13))
    with pytest.raises(
        ValueError, match=r"compiled for states of streaming\(max_tokens=12\).* of streaming\(max_tokens=13\)"
    ):
        CompiledDecode(model, one)(token, joined(model, other, [token]))
    with pytest.raises(ValueError, match="compiled for states of the full cache, and this one is of streaming"):
        CompiledDecode(model)(token, joined(model, one, [token]))
    with pytest.raises(ValueError, match=r"compiled for states of streaming.* of the full cache"):
        CompiledDecode(model, one)(token, model.init_state(1, 8))


def test_a_full_state_is_refused():
    model = llama_like()
    with torch.inference_mode():
        _, state = model.extend_hidden(torch.zeros(1, 70, dtype=torch.long), model.init_state(1, 70))
    with pytest.raises(ValueError, match="room for 70 tokens, not 71"):
        CompiledDecode(model)(torch.zeros(1, 1, dtype=torch.long), state)


def follow_compressed(model: DecoderLM, cache: CachePolicy, lengths: list[int], steps: int) -> None:
    """As `follow`, for prompts that are read alone, compressed, and joined, as a server joins them."""
    step, generator = CompiledDecode(model, cache), torch.Generator().manual_seed(1)
    prompts = [torch.randint(model.config.vocab_size, (1, length), generator=generator) for length in lengths]
    with torch.inference_mode():
        states = [joined(model, cache, prompts) for _ in range(2)]
        for new in torch.randint(model.config.vocab_size, (steps, len(lengths), 1), generator=generator):
            expected, states[0] = model.extend_hidden(new, states[0])
            hidden, states[1] = step(new, states[1])
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in states[0].tensors().items():
        torch.testing.assert_close(states[1].tensors()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def joined(model: DecoderLM, cache: CachePolicy, prompts: list[torch.Tensor]) -> DecoderState:
    rows = []
    for prompt in prompts:
        _, state = model.extend_hidden(prompt, model.init_state(1, prompt.shape[1], cache=cache))
        rows.append(model.compress(state, joinable=True))
    return reduce(DecoderState.joined, rows)


@pytest.mark.heavy
def test_the_same_function_with_a_cache_that_evicts():
    """Sequences of unequal lengths: all take empty slots, one in a second page, until it loses a token a step."""
    cache = build_cache("d2o", {"max_tokens": 80, "sinks": 2, "budget": "uniform"})
    follow_compressed(small_model("mha", max_len=128), cache, [60, 12, 9], steps=25)


CACHES = {
    "official": ("d2o", {"max_tokens": 24, "flavor": "official"}),
    "merge_counts": ("d2o", {"keep_ratio": 0.4, "min_tokens": 0, "merge_counts": True}),
    "nothing merged": ("d2o", {"keep_ratio": 0.4, "min_tokens": 0, "merge": False}),
    "streaming": ("streaming", {"keep_ratio": 0.4, "min_tokens": 0}),
    "random": ("random_tokens", {"keep_ratio": 0.4, "min_tokens": 0}),
    "thin": ("d2o+think", {"max_tokens": 20, "window": 4, "value_channel_ratio": 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mha", "mdha"])
@pytest.mark.parametrize("name", CACHES)
def test_the_same_function_with_each_cache_that_evicts(name, kind):
    cache = build_cache(*CACHES[name])
    # In float32 two of some thousand choices are so close that the order of a sum decides.
    model = small_model(kind, layers=4 if name == "official" else 2).double()
    follow_compressed(model, cache, [40, 23, 12], steps=15)
    follow_compressed(model, cache, [40], steps=15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mdha", "linear", "packed"])
def test_the_same_function_for_each_variant(kind):
    model = pack_weights(llama_like()) if kind == "packed" else small_model(kind, max_len=160)
    step = CompiledDecode(model)
    follow(model, 1, [61], 6, step)
    follow(model, 3, [61, 17, 40], 6, step)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "cache", [None, pytest.param({"policy": "streaming", "max_tokens": 12}, marks=pytest.mark.slow)]
)
def test_the_engine_says_the_same(cache, monkeypatch):
    """Sequences come and go: a pool of compressed caches is another state after each. A request that edits attention
    does so exactly, in steps of its own that are not compiled, beside others whose steps are. Kills: compiled code that
    leaves edits out."""
    model = small_model("mha")
    lm = LanguageModel(model, load_tokenizer(tokenizer_path().parent))
    wish = {"edits": [Add(Where(keys=0), 3.0)], "read": [Map(Where(layers=1), dtype="fp32")]}
    edited = lm.generate([31] * 20, max_new_tokens=8, ignore_eos=True, cache=cache, **wish)
    texts, steps = [], []
    compiled_call = CompiledDecode.__call__
    monkeypatch.setattr(CompiledDecode, "__call__", lambda *given: steps.append(1) or compiled_call(*given))
    for compiled in (False, True):
        config = EngineConfig(
            checkpoint=str(tokenizer_path().parent), max_num_seqs=3, compile_decode=compiled, cache=cache
        )
        engine = Engine(config, model=model, tokenizer=load_tokenizer(tokenizer_path().parent))
        steps.clear()  # those of warming up
        prompts = [[5, 9, 12], [7] * 9, [300, 20], [31] * 20]
        texts.append([done.tokens for done in engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))])
        assert bool(len(steps) >= 20) is compiled
        assert bool(with_edits(engine, prompts[:2], [31] * 20, wish, edited) >= 7) is compiled
    assert texts[0] == texts[1]


def with_edits(engine: Engine, others: list[list[int]], prompt: list[int], wish: dict, expected: Generation) -> int:
    """Runs a request that reads and edits beside others; the number of compiled steps."""
    found, steps = {"edited": []}, []
    (plan,) = AttentionWish(**wish).plans(engine.model, engine.tokenizer, [prompt], [8])
    call = CompiledDecode.__call__
    with mock.patch.object(CompiledDecode, "__call__", lambda *given: steps.append(1) or call(*given)):
        params, choice = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0), engine.choose_cache(None)
        engine.add_request("edited", prompt, params, cache=choice, plan=plan)
        for index, other in enumerate(others):
            engine.add_request(str(index), other, params, cache=choice)
        while engine.has_work():
            for delta in engine.step():
                found.setdefault(delta.request_id, []).append(delta)
    logprobs = [each for delta in found["edited"] for each in delta.logprobs]
    assert [each.token for each in logprobs] == list(expected.token_ids)
    assert found["edited"][-1].run.reading[1].map.shape == expected.reading[1].map.shape
    torch.testing.assert_close(found["edited"][-1].run.reading[1].map, expected.reading[1].map, rtol=1e-4, atol=1e-5)
    return len(steps)


def test_a_state_that_is_not_settled_is_refused():
    model, cache = small_model("mha"), build_cache("d2o", {"max_tokens": 24})
    with torch.inference_mode():
        _, state = model.extend_hidden(torch.zeros(1, 9, dtype=torch.long), model.init_state(1, 9, cache=cache))
    with pytest.raises(ValueError, match="joinable=True"):
        CompiledDecode(model, cache)(torch.zeros(1, 1, dtype=torch.long), model.compress(state))


@pytest.mark.parametrize("cache", [("think", {}), ("snapkv", {}), ("d2o", {"keep_ratio": 1.0})])
def test_caches_that_grow_are_refused(cache):
    with pytest.raises(ValueError, match=r"layer 0: .* grows with every token.*compile_decode=False"):
        CompiledDecode(small_model("mha"), build_cache(*cache))


@pytest.mark.parametrize("kind", ["rmha", "rcmha", "sinusoid", "window"])
def test_what_cannot_be_compiled_is_refused(kind):
    with pytest.raises(ValueError, match=r"layer 0: decoding cannot be compiled for .*MHA.*compile_decode=False"):
        CompiledDecode(small_model(kind))


def test_a_compiler_is_needed():
    model = DecoderLM(DecoderConfig(vocab_size=TOKENS, model_dim=16, num_layers=1))
    # Not monkeypatch: what it puts back, the configuration no longer finds.
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        CompiledDecode(model)
