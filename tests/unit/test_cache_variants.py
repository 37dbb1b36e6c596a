"""What caches ask of a model: variants that cannot, layers that differ, states of other models, and nothing at all."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.attention.mha import MHA
from attnzoo.attention.parts import RelativeTable
from attnzoo.kvcache import CacheSize, FullCache, KVLayer, State, WindowCache, build_cache, load_state, save_state
from attnzoo.kvcache.base import NewTokens, caches_of
from attnzoo.kvcache.window import _positions
from attnzoo.models import DecoderConfig, DecoderLM, generate
from attnzoo.ops.common.step_inputs import StepInputs
from serve.config import EngineConfig
from serve.engine import Engine
from tests.contract.caches import LOSSLESS, POLICIES, build_model, layers_of, policy_of, prompt, run
from tests.contract.cases import assert_close
from tests.helpers.serving import small_model, tokenizer

NEED_NO_SCORES = ("streaming", "random_tokens")


class Silent(RelativeTable):
    """A position that attends, and says neither `terms` nor `tables`."""

    terms = RelativeTable.__mro__[1].terms
    tables = RelativeTable.__mro__[1].tables


class OnlyTerms(RelativeTable):
    """One that says its terms by query alone."""

    tables = RelativeTable.__mro__[1].tables


def silenced(model: DecoderLM, kind: type) -> DecoderLM:
    for block in model.layers():
        block.attention.mixing.position.__class__ = kind
    return model


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_needs_of_a_variant_is_asked_before_the_first_token(name):
    model, policy = silenced(build_model("rcmha", layers=layers_of(name)), Silent), policy_of(name)
    if name in NEED_NO_SCORES:
        expected, _ = run(build_model("rcmha", layers=layers_of(name)), policy, prompt(2, 24), 14)
        assert_close(run(model, policy, prompt(2, 24), 14)[0], expected, name)
        return
    for ask in (lambda: model.byte_model(policy), lambda: model.init_state(1, 4, cache=policy)):
        with pytest.raises(ValueError, match=r"Silent does not say its scores .*streaming or random_tokens"):
            ask()


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_said_is_enough_for_some(name):
    model, policy = silenced(build_model("rcmha", layers=layers_of(name)), OnlyTerms), policy_of(name)
    if "tables" in policy.needs:
        with pytest.raises(ValueError, match="write its `tables`"):
            model.byte_model(policy)
    else:
        expected, _ = run(build_model("rcmha", layers=layers_of(name)), policy, prompt(2, 24), 14)
        assert torch.equal(run(model, policy, prompt(2, 24), 14)[0], expected)
    assert (name.startswith("d2o") or name == "snapkv") is ("tables" in policy.needs)


def test_what_keeps_everything_needs_nothing():
    model = silenced(build_model("rcmha", layers=2), Silent)
    for policy, many in LOSSLESS.items():
        for options in many:
            if "max_tokens" not in options:
                assert model.byte_model(build_cache(policy, options)).reading(4) > 0


def test_an_engine_asks_when_it_starts_and_when_a_request_comes():
    model = silenced(small_model("rcmha"), Silent)

    def start(**settings: Any) -> Engine:
        return Engine(EngineConfig(checkpoint="none", **settings), model=model, tokenizer=tokenizer())

    with pytest.raises(ValueError, match="Silent does not say its scores"):
        start(cache={"policy": "d2o"})
    with pytest.raises(ValueError, match=r"cache_bounds.think: this model cannot have it: .*Silent does not say"):
        start(cache_bounds={"think": {"channel_ratio": [0.5, 1.0], "window": [1.5, 9]}})
    engine = start(cache={"policy": "streaming", "max_tokens": 8})
    with pytest.raises(ValueError, match="Silent does not say"):
        engine.choose_cache({"policy": "snapkv"})
    assert engine.choose_cache({"policy": "random_tokens", "keep_ratio": 0.5}).policy == "random_tokens"
    with pytest.raises(ValueError, match=r"cache_bounds.think.*the least that it allows, .* is refused: window=0"):
        start(cache_bounds={"think": {"window": [0, 9]}})


@dataclass
class OwnState(State):
    inputs_BTD: Tensor


class ByHand(MHA):
    """Forms and state of its own; it takes `cache`, and would ignore it."""

    def init_state(self, batch: int, capacity: int, *, device=None, dtype=None, cache=None) -> OwnState:
        return OwnState(torch.zeros(batch, 0, self.config.model_dim, device=device, dtype=dtype))

    def extend(self, x_BTD: Tensor, state: Any, counts_B: Tensor | None = None) -> tuple[Tensor, OwnState]:
        seen = torch.cat([state.inputs_BTD, x_BTD], dim=1)
        return self(seen)[:, -x_BTD.shape[1] :], OwnState(seen)


class ByHandAlone(ByHand):
    """One that does not know of caches."""

    def init_state(self, batch: int, capacity: int, *, device=None, dtype=None) -> OwnState:  # type: ignore[override]
        return super().init_state(batch, capacity, device=device, dtype=dtype)


@pytest.mark.parametrize("kind", [ByHand, ByHandAlone])
def test_a_variant_with_a_state_of_its_own_says_why(kind, monkeypatch):
    monkeypatch.setitem(ATTENTION._items, "by_hand", kind)
    model = DecoderLM(DecoderConfig(vocab_size=29, model_dim=16, num_layers=2, attention=["by_hand", "mha"]))
    for name in POLICIES:
        with pytest.raises(ValueError, match=rf"{kind.__name__} keeps a state of its own, not .*cache=None"):
            model.byte_model(policy_of(name))
    exact = generate(model, [[5, 6]], max_new_tokens=4)
    assert generate(model, [[5, 6]], max_new_tokens=4, cache=build_cache("full")) == exact


@dataclass
class PairState(State):
    lengths_B: Tensor
    parts: tuple[State, ...]


class Pair(MHA):
    """Two attentions in a row, each with keys of its own; `kept` of them are said to be there."""

    kept: ClassVar[int] = 2

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.second = MHA(config)

    def parts(self) -> tuple[Any, MHA]:
        return super(), self.second

    def kv_layers(self) -> tuple[KVLayer, ...]:
        return (super().kv_layers() + self.second.kv_layers())[: self.kept]

    def init_state(self, batch: int, capacity: int, *, device=None, dtype=None, cache=None) -> PairState:
        made = [each.init_state(batch, capacity, device=device, dtype=dtype, cache=cache) for each in self.parts()]
        return PairState(torch.zeros(batch, dtype=torch.int64, device=device), tuple(made))

    def extend(self, x_BTD: Tensor, state: Any, counts_B: Tensor | None = None) -> tuple[Tensor, PairState]:
        parts = []
        for each, part in zip(self.parts(), state.parts, strict=True):
            x_BTD, part = each.extend(x_BTD, part, counts_B)
            parts.append(part)
        return x_BTD, PairState(parts[0].lengths_B, tuple(parts))


class HalfPair(Pair):
    """It forgets to say the second."""

    kept = 1


def test_a_variant_with_keys_in_two_places_is_compressed_in_both_or_refused(monkeypatch):
    """Kills: the second place left whole without a word."""
    for name, kind in (("pair", Pair), ("half", HalfPair)):
        monkeypatch.setitem(ATTENTION._items, name, kind)
    model = DecoderLM(DecoderConfig(vocab_size=29, model_dim=16, num_layers=2, attention="pair")).eval()
    policy = build_cache("streaming", {"max_tokens": 8})
    with torch.no_grad():
        _, state = model.extend(prompt(1, 20), model.init_state(1, 20, cache=policy))
        state = model.compress(state)
        _, state = model.extend(prompt(1, 3), state)
    held = [int(cache.held_B) + cache.ring.slots for cache in caches_of(state)]
    assert held == [9] * 4  # one slot of the ring is for the next token
    assert model.byte_model(policy).compressed(20, 3) == state.nbytes()
    half = DecoderLM(DecoderConfig(vocab_size=29, model_dim=16, num_layers=2, attention="half"))
    with pytest.raises(ValueError, match="HalfPair keeps a state of its own"):
        half.init_state(1, 20, cache=policy)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 0), (4, 2), (5, 7)])
def test_slots_of_a_window_hold_the_tokens_of_a_plain_count(window, sinks):
    """Tokens put into their slots one after the other, at every length and number of slots."""
    for slots in range(1, sinks + window + 1):
        for length in range(slots if slots < sinks + window else 3 * (sinks + window)):
            expected = [-1] * slots
            for p in range(length):
                expected[p if p < sinks else sinks + (p - sinks) % window] = p
            assert _positions(torch.tensor([length]), slots, window, sinks).tolist() == [expected]


def test_a_window_of_another_layer_is_refused():
    narrow, wide = (build_attention("mha", {"model_dim": 8, "num_heads": 2, "window": n}) for n in (3, 4))
    with pytest.raises(
        ValueError, match=r"window\(window=3, sinks=0\), and this layer's is window\(window=4, sinks=0\)"
    ):
        wide.extend(torch.randn(1, 2, 8), narrow.init_state(1, 4))
    with pytest.raises(ValueError, match="is no cache policy"):
        build_attention("mha", {"model_dim": 8, "num_heads": 2}).init_state(1, 4, cache=WindowCache(3))


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in POLICIES.values()}))
def test_no_policy_has_a_field_that_it_does_not_use(kind):
    """Every tensor of a state holds something at some time under some options."""
    filled, names = set(), set()
    for name in [name for name in POLICIES if POLICIES[name][0] == kind]:
        changes = {"value_channel_ratio": 0.5} if "channel_ratio" in POLICIES[name][1] else {}
        model, policy = build_model("gqa", layers=2), policy_of(name, **changes)
        _, state = model.extend(prompt(1, 12), model.init_state(1, 12, cache=policy))
        for _ in range(3):
            for cache in caches_of(state):
                names |= cache.tensors().keys()
                filled |= {field for field, x in cache.tensors().items() if x.count_nonzero()}
            state = model.compress(state) if next(caches_of(state)).reading else state
            _, state = model.extend(prompt(1, 3), state)
    assert filled == names


def test_the_exact_cache_is_every_variants():
    model = DecoderLM(DecoderConfig(vocab_size=29, model_dim=16, num_layers=2, attention="linear"))
    exact = generate(model, [[5, 6]], max_new_tokens=4)
    assert generate(model, [[5, 6]], max_new_tokens=4, cache=build_cache("full")) == exact


MIXED = [
    {"kind": "mha", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    {"kind": "mha", "num_heads": 3, "head_dim": 4},
    {"kind": "rcmha", "num_heads": 4, "num_kv_heads": 1, "head_dim": 6, "max_distance": 9},
    {"kind": "linear", "num_heads": 2},
]


@pytest.mark.parametrize("name", POLICIES)
def test_layers_whose_kv_heads_differ(name):
    """Grouped heads beside one kv head a query head, other widths, and a layer that keeps a matrix."""
    config = DecoderConfig(vocab_size=29, model_dim=14, num_layers=8, attention=MIXED)
    model = DecoderLM(config).double().eval().requires_grad_(False)
    tokens, lengths = prompt(2, 24), torch.tensor([16, 13])
    policy = policy_of(name)
    _, state = model.extend(tokens[:, :16], model.init_state(2, 16, cache=policy), lengths)
    logits, _ = model.extend(tokens[:, 16:], model.compress(state))
    alone, _ = run(model, policy, torch.cat([tokens[1:, :13], tokens[1:, 16:]], dim=1), 13)
    assert_close(logits[1:], alone, name, tolerance=1e-9)
    full, _ = run(model, None, torch.cat([tokens[1:, :13], tokens[1:, 16:]], dim=1), 13)
    assert not torch.allclose(full, alone), "nothing was compressed"


ANY = {**POLICIES, **{f"lossless {name}": (name, many[0]) for name, many in LOSSLESS.items() if name != "full"}}


@pytest.mark.parametrize("length", [1, 3, 18])
@pytest.mark.parametrize("name", ANY)
def test_compress_twice_is_refused(name, length):
    """However short the prompt, at once and after tokens have come; the state can still be used."""
    policy, options = ANY[name]
    model = build_model("gqa", layers=layers_of(name))
    for joinable in (False, True):
        cache = build_cache(policy, options)
        _, state = model.extend(prompt(1, length), model.init_state(1, length, cache=cache))
        state = model.compress(state, joinable=joinable)
        for _ in range(2):
            with pytest.raises(ValueError, match="compressed already"):
                model.compress(state)
            logits, state = model.extend(prompt(1, 1), state)
            assert torch.isfinite(logits).all()


def test_exact_states_have_nothing_to_compress():
    model = build_model("gqa", layers=2)
    _, state = model.extend(prompt(1, 4), model.init_state(1, 4, cache=build_cache("full")))
    again = model.compress(model.compress(state))
    assert all(torch.equal(x, y) for x, y in zip(again.tensors().values(), state.tensors().values(), strict=True))


@pytest.mark.parametrize("name", [*ANY, None])
def test_empty_inputs_are_refused(name):
    model = build_model("gqa", layers=layers_of(name or ""))
    cache = None if name is None else build_cache(*ANY[name])
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        model.init_state(0, 4, cache=cache)
    with pytest.raises(ValueError, match="capacity=-1"):
        model.init_state(1, -1, cache=cache)
    state = model.init_state(2, 0, cache=cache)
    if cache is not None:
        with pytest.raises(ValueError, match="holds no token yet"):
            model.compress(state)
    for tokens in (prompt(2, 0), prompt(0, 3), prompt(0, 0)):
        with pytest.raises(ValueError, match="give at least one sequence and one token"):
            model.extend(tokens, state)
    with pytest.raises(ValueError, match=r"shape \(3, 1\), the state holds 2 sequences; give one row of tokens"):
        model.extend(prompt(3, 1), state)
    # A sequence without a token beside one that has some goes on from nothing.
    _, state = model.extend(prompt(2, 12), state, torch.tensor([12, 0]))
    logits, _ = model.extend(prompt(2, 3), model.compress(state))
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("cache", [FullCache(), WindowCache(3)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 1), (0, 0)])
def test_caches_refuse_chunks_of_nothing(cache, batch, tokens):
    state = cache.init(CacheSize(batch, 2, 2, 3, torch.float32), 4)
    keys = torch.zeros(batch, 2, tokens, 3)
    with pytest.raises(ValueError, match="at least one token of at least one sequence"):
        cache.attend(state, None, NewTokens(keys, keys, keys, StepInputs.of(torch.zeros(batch).long(), tokens)))


@pytest.mark.parametrize("name", ["d2o", "think", "snapkv", "streaming"])
def test_policies_refuse_chunks_of_nothing(name):
    attention = build_model("gqa", layers=1).layers()[0].attention
    state = attention.init_state(1, 4, cache=policy_of(name))
    score_function = attention.mixing.score_function("torch")
    nothing = tuple(torch.zeros(1, heads, 0, 6).double() for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="at least one token of at least one sequence"):
        policy_of(name).attend(state.mixing, score_function, NewTokens(*nothing, StepInputs.planned([0], 0)))


def saved(model: DecoderLM, path: Any, cache: Any = None) -> Any:
    _, state = model.extend(prompt(1, 9), model.init_state(1, 9, cache=cache))
    save_state(state if cache is None else model.compress(state), path)
    return path


def test_a_state_is_loaded_into_its_own_model_and_policy_alone(tmp_path):
    path = tmp_path / "state.safetensors"
    model, one = build_model("gqa", layers=2), build_cache("d2o", {"max_tokens": 8})
    saved(model, path, one)
    load_state(model.init_state(1, 1, cache=build_cache("d2o", {"max_tokens": 8})), path)
    others = {
        r"of another policy: .*max_tokens=8.*max_tokens=9": build_cache("d2o", {"max_tokens": 9}),
        r"of another policy: .*d2o\(.*streaming\(": build_cache("streaming", {"max_tokens": 8}),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            load_state(model.init_state(1, 1, cache=other), path)
    with pytest.raises(ValueError, match=r"a state of this model|another policy"):
        load_state(model.init_state(1, 1), path)
    with pytest.raises(ValueError, match=r"of another model: .*weights"):
        load_state(build_model("gqa", seed=1, layers=2).init_state(1, 1, cache=one), path)
    with pytest.raises(ValueError, match="of another model"):
        load_state(build_model("mha", layers=2).init_state(1, 1, cache=one), path)
    # Layers are not told which model they are of: their sizes say it.
    half = build_model("mha", layers=2).layers()[0].attention
    save_state(build_model("gqa", layers=2).layers()[0].attention.init_state(1, 5), path)
    with pytest.raises(ValueError, match=r"axis K is 3 in this model"):
        load_state(half.init_state(1, 5), path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 64, b"x" * 1000])
def test_what_is_no_state_is_refused(content, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    model = build_model("gqa", layers=2)
    for place in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="not a state written by save_state"):
            load_state(model.init_state(1, 1), place)
