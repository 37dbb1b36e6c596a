"""What a cache may be asked for: options within what a model can hold, and bytes that are known before."""

import math
import re
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from attnzoo.kvcache import CACHES, build_cache
from attnzoo.kvcache.channels import kept_channels
from attnzoo.kvcache.options import NOT_LENGTHS
from attnzoo.models import DecoderConfig, DecoderLM, generate
from serve.caches import CacheRules
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.contract.caches import prompt
from tests.helpers.serving import MAX_LEN, small_model, tokenizer

HUGE = 10**22
LENGTHS = [
    (policy, field.name)
    for policy in CACHES
    for field in fields(CACHES.get(policy).Config)
    if int in (get_args(hint := get_type_hints(CACHES.get(policy).Config)[field.name]) or (hint,))
    and field.name not in NOT_LENGTHS
]
REST = {("d2o+think", "max_tokens"): {"window": 1, "channel_ratio": 0.5}}


def engine_of(**settings: Any) -> Engine:
    return Engine(EngineConfig(checkpoint="none", **settings), model=small_model("mha"), tokenizer=tokenizer())


def asking(policy: str, **options: Any) -> dict[str, Any]:
    return {"policy": policy, **options}


def test_there_are_lengths_to_bound():
    assert {("snapkv", "pool"), ("think", "repack_every"), ("d2o+think", "window"), ("streaming", "sinks")} < set(
        LENGTHS
    )


@pytest.mark.parametrize(("policy", "option"), LENGTHS, ids=lambda x: x)
def test_every_length_is_bounded_by_what_the_model_can_read(policy, option):
    """In a server, where the step would fail for all, and without one."""
    engine, given = engine_of(), REST.get((policy, option), {})
    for value in (MAX_LEN + 1, 2**40, 2**70, HUGE):
        odd = value + (option == "pool" and value % 2 == 0)
        message = f"cache.{option}={odd} is more than the {MAX_LEN} tokens that this model can read"
        with pytest.raises(ValueError, match=re.escape(message)):
            engine.choose_cache(asking(policy, **{option: odd}))
        with pytest.raises(ValueError, match=re.escape(message)):
            generate(engine.model, [[5]], max_new_tokens=1, cache=build_cache(policy, {option: odd}))
    most = MAX_LEN - (option == "pool")
    tokens = generate(engine.model, [[5, 6, 7]], max_new_tokens=3, cache=build_cache(policy, given | {option: most}))
    assert len(tokens[0]) == 3


def test_defaults_are_never_too_large_for_a_model():
    config = DecoderConfig(vocab_size=9, model_dim=8, num_layers=2, attention="mha", max_positions=4)
    for policy in CACHES:
        assert generate(DecoderLM(config), [[5, 6]], max_new_tokens=2, cache=build_cache(policy))


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf, True, "0.5", [0.5], {"a": 0.5}, 0, -1])
@pytest.mark.parametrize(
    ("policy", "option"), [("d2o", "keep_ratio"), ("d2o", "beta"), ("think", "channel_ratio"), ("snapkv", "keep_ratio")]
)
def test_ratios_are_finite_numbers(policy, option, value):
    with pytest.raises(ValueError, match=rf"\b{option}="):
        engine_of().choose_cache(asking(policy, **{option: value}))


@pytest.mark.parametrize("value", [True, 3.0, math.nan, "3", [3], {"a": 3}, -1])
@pytest.mark.parametrize(("policy", "option"), [("think", "window"), ("d2o", "sinks"), ("snapkv", "pool")])
def test_lengths_are_whole_numbers(policy, option, value):
    with pytest.raises(ValueError, match=rf"\b{option}="):
        engine_of().choose_cache(asking(policy, **{option: value}))


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("random_tokens", {"seed": 2**70}, "seed=1180591620717411303424 must fit into 64 bits"),
        ("random_channels", {"seed": -(2**64)}, "must fit into 64 bits"),
        ("random_channels", {"repack_every": 0}, "repack_every=0 must be at least 1"),
        ("d2o", {"min_tokens": -1}, "min_tokens=-1"),
        ("d2o", {"min_tokens": 5, "max_tokens": 9}, "leave one of them out"),
    ],
)
def test_other_options_out_of_range(policy, options, message):
    with pytest.raises(ValueError, match=message):
        build_cache(policy, options)


@pytest.mark.parametrize("head_dim", [1, 5, 64])
def test_a_ratio_of_next_to_nothing_leaves_a_channel(head_dim):
    assert kept_channels(head_dim, 1e-300) == kept_channels(head_dim, 1e-12) == 1
    model = small_model("mha")
    assert generate(model, [[5] * 40], max_new_tokens=2, cache=build_cache("think", {"channel_ratio": 1e-12}))


def shipped() -> dict[str, Any]:
    with open("configs/serve/compressed.yaml", encoding="utf-8") as file:
        found: dict[str, Any] = yaml.safe_load(file)
    return found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            asking("think", window=10),
            "cache.window is not for requests to set here: of 'think' only channel_ratio",
        ),
        (asking("think", repack_every=HUGE), "cache.repack_every is not for requests to set here"),
        (asking("d2o", keep_ratio=0.3, sinks=4), "leave it out for its default, 4"),
        (asking("d2o", max_tokens=9), "0.1 and 0.5; cache.max_tokens is not for requests to set here"),
        (asking("d2o", keep_ratio=0.3, min_tokens=0), "cache.min_tokens is not for requests to set here"),
    ],
)
def test_options_without_bounds_keep_their_defaults(asked, message):
    engine = engine_of(**shipped())
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.choose_cache(asked)
    assert engine.choose_cache(asking("d2o", keep_ratio=0.3)).config.sinks == 4
    assert engine.choose_cache(asking("d2o", keep_ratio=0.2, prefill="stream")) == engine.caches.default


def test_either_budget_where_both_are_bounded():
    rules = CacheRules(None, {"d2o": {"keep_ratio": [0.3, 0.5], "max_tokens": [20, 30]}, "think": {}, "snapkv": None})
    assert rules.choose(asking("d2o", max_tokens=25)).config.max_tokens == 25
    assert rules.choose(asking("d2o", keep_ratio=0.4)).config.keep_ratio == 0.4
    with pytest.raises(ValueError, match=r"cache.keep_ratio=0.2 is not allowed here"):
        rules.choose(asking("d2o"))  # its default
    with pytest.raises(ValueError, match=r"cache.max_tokens=31 is not allowed here"):
        rules.choose(asking("d2o", max_tokens=31))
    with pytest.raises(ValueError, match=r"cache.window is not for requests .* no option can be"):
        rules.choose(asking("think", window=3))
    assert rules.choose(asking("snapkv", pool=3)).config.pool == 3


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"d2o": {"flavor": [1, 2]}}, "cache_bounds.d2o.flavor=[1, 2]: the option is no number"),
        ({"d2o": {"flavor": ["papers"]}}, "cache_bounds.d2o.flavor='papers' is not one of"),
        ({"d2o": {"keep_ratio": [math.nan, 0.5]}}, "least <= most"),
        ({"d2o": {"keep_ratio": ["a", "b"]}}, "cache_bounds.d2o.keep_ratio='a' has type str"),
        (["d2o"], "cache_bounds=['d2o'] has type list; it must be dict"),
        ({3: {}}, "cache_bounds.3: no such cache policy"),
    ],
)
def test_bounds_are_of_the_options_types(bounds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig(checkpoint="none", cache_bounds=bounds)


@pytest.mark.parametrize("window", [1, 9, MAX_LEN])
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("think", {}),
        ("think", {"repack_every": 2}),
        ("think", {"repack_every": 3, "mask": "recomputed"}),
        ("snapkv", {"keep_ratio": 0.3, "min_tokens": 0}),
        ("snapkv", {"keep_ratio": 0.3}),
        ("d2o+think", {"keep_ratio": 0.9, "budget": "uniform", "min_tokens": 0}),
        ("d2o+think", {"keep_ratio": 0.9, "budget": "uniform"}),
    ],
)
def test_the_windows_memory_is_in_the_byte_model(policy, options, window):
    """Fewer kv heads than query heads, prompts shorter and longer than the window: the state while the prompt is read,
    and a row of a server's pool after, to the byte."""
    config = DecoderConfig(
        vocab_size=29, model_dim=16, num_layers=2, attention={"kind": "mha", "num_heads": 4, "num_kv_heads": 2},
        max_positions=MAX_LEN,
    )  # fmt: skip
    model, cache = DecoderLM(config).requires_grad_(False), build_cache(policy, options | {"window": window})
    known = model.byte_model(cache)
    for length in (2, 40):
        tokens = prompt(1, length + 3)
        _, state = model.extend(tokens[:, :length], model.init_state(1, length, cache=cache))
        assert state.nbytes() == known.reading(length)
        state = model.compress(state, joinable=True)
        for after in range(3):
            assert state.nbytes() == known.compressed(length, after), f"{after} tokens after {length}"
            _, state = model.extend(tokens[:, length + after : length + after + 1], state)


@pytest.mark.parametrize("policy", ["d2o", "streaming"])
def test_a_settled_row_of_a_short_prompt_is_in_the_byte_model(policy):
    model, cache = small_model("mha"), build_cache(policy)
    _, state = model.extend(torch.tensor([[5, 6, 7]]), model.init_state(1, 3, cache=cache))
    state = model.compress(state, joinable=True)
    for after in range(3):
        assert state.nbytes() == model.byte_model(cache).compressed(3, after)
        _, state = model.extend(torch.tensor([[8]]), state)


def test_a_window_that_is_mostly_empty_is_not_allocated():
    model = small_model("mha", max_len=4096)
    one, many = (build_cache("think", {"window": window}) for window in (2, 4096))
    sizes = [model.extend(prompt(1, 2), model.init_state(1, 2, cache=cache))[1].nbytes() for cache in (one, many)]
    assert sizes[0] == sizes[1]


def test_memory_of_the_window_is_refused_at_admission():
    model = small_model("mha", dim=256, layers=4, max_len=2048)
    config = EngineConfig(checkpoint="none", cache_mib=4)
    engine = Engine(config, model=model, tokenizer=tokenizer())
    asked = engine.choose_cache(asking("d2o+think", window=2048))
    with pytest.raises(ValueError, match=r"this request's cache needs .* MiB, and there are cache_mib=4"):
        engine.generate([[5, 6]], SamplingParams(max_tokens=2), cache={"policy": "d2o+think", "window": 2048})
    assert engine.admission._byte_model(asked).compressed(2, 1) > 2048 * 256 * 4 * 2 * 4


def test_old_names_of_options_work_with_a_warning():
    with pytest.warns(FutureWarning, match="cache.think.retail is now called cache.think.repack_every"):
        assert build_cache("think", {"retail": 8}).config.repack_every == 8
    with pytest.warns(FutureWarning, match="cache.d2o.votes is now called cache.d2o.merge_counts"):
        assert build_cache("d2o", {"votes": True}).config.merge_counts
    with pytest.raises(
        ValueError, match=r"cache\.d2o\.votes is the old name of cache.d2o.merge_counts: give the new one"
    ):
        build_cache("d2o", {"votes": True, "merge_counts": True})
    with pytest.warns(FutureWarning, match="cache_bounds.think.retail"):
        rules = CacheRules(None, {"think": {"retail": [4, 16]}})
    with pytest.warns(FutureWarning, match="cache.retail"):
        choice = rules.choose({"policy": "think", "retail": 8})
    assert choice == rules.choose({"policy": "think", "repack_every": 8})
    with pytest.raises(ValueError, match=r"cache\.repack_every=64 is not allowed here"):
        rules.choose({"policy": "think", "repack_every": 64})
