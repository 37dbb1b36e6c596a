"""From text to text: every argument of `LanguageModel`, and what it refuses."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from attnzoo import GenerationConfig, LanguageModel
from attnzoo.generation import AttentionWish, GenerationOptions, as_batch
from attnzoo.kvcache import CACHES, build_cache
from attnzoo.kvcache.choice import option_names
from attnzoo.kvcache.compressed import PAGE
from attnzoo.models import DecoderLM, generate
from attnzoo.models.generation_config import FIELDS
from attnzoo.tokenizer import SentencePieceTokenizer
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.serving import MAX_LEN, chat_tokenizer, lm_of, small_model, tokenizer, tokenizer_path

TEXTS = ["The slots", "def step(self", "数据", "Der Zustand einer Folge ist mehr als", "a"]
POLICIES: list[dict[str, Any]] = [
    {"policy": "full"},
    {"policy": "d2o", "keep_ratio": 0.5, "min_tokens": 0},
    {"policy": "d2o", "max_tokens": 9, "prefill": "stream"},
    {"policy": "think", "channel_ratio": 0.5, "window": 4},
    {"policy": "d2o+think", "keep_ratio": 0.6, "min_tokens": 0, "window": 2},
    {"policy": "streaming", "max_tokens": 8},
]


def ending(lm: LanguageModel, token: int) -> LanguageModel:
    """The same model, whose texts end at a token."""
    own = SentencePieceTokenizer.load(tokenizer_path())
    own.stop_ids = own.stop_ids | {token}
    return LanguageModel(lm.model, own)


def without_logprobs(found: Any) -> list[Any]:
    return [(each.prompt_token_ids, [dataclasses.replace(x, logprobs=None) for x in each.outputs]) for each in found]


@pytest.mark.parametrize("kind", ["mha", "rcmha", "mixed", "window"])
def test_a_text_is_that_of_the_plain_loop(kind, monkeypatch):
    lm = lm_of(kind)
    found = lm.generate(TEXTS, max_new_tokens=12, ignore_eos=True)
    plain = generate(lm.model, [lm.encode(text) for text in TEXTS], max_new_tokens=12)
    for text, each, tokens in zip(TEXTS, found, plain, strict=True):
        assert each.prompt == text
        assert list(each.prompt_token_ids) == tokenizer().encode(text, bos=True)
        assert each.prompt_tokens == len(each.prompt_token_ids)
        assert list(each.token_ids) == tokens
        assert each.text == tokenizer().decode(tokens, start=False)
        assert (each.finish_reason, each.logprobs) == ("length", None)
        context = each.prompt_tokens + 11  # the last token has not been through the model
        assert each.cache.policy == "full"
        assert each.cache.kv_bytes == each.cache.kv_bytes_full == lm.model.cost(1, 1, context).state_bytes
        assert each.cache.kept_tokens == (min(context, 9) if kind == "window" else context)
    assert lm.generate(lm.encode(TEXTS[0]), max_new_tokens=12, ignore_eos=True).outputs == found[0].outputs
    assert lm.generate(torch.tensor(lm.encode(TEXTS[0])), max_new_tokens=12, ignore_eos=True).prompt is None
    monkeypatch.setattr("attnzoo.models.sequences.ROOM", 2)  # caches grow while they are written
    assert lm.generate(TEXTS, max_new_tokens=12, ignore_eos=True) == found


@pytest.mark.parametrize("cache", [None, POLICIES[1]], ids=["full", "d2o"])
def test_a_batch_equals_its_members(cache):
    """Whatever runs beside it, with and without chance, text and ids mixed."""
    lm = lm_of()
    batch = [TEXTS[0], lm.encode(TEXTS[3]), TEXTS[4]]
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 5.0, "seed": -3, "n": 2, "logprobs": 2}
    alone = [lm.generate(prompt, cache=cache, **options) for prompt in batch]
    for size in (2, 100):
        together = lm.generate(batch, cache=cache, batch_size=size, **options)
        assert without_logprobs(together) == without_logprobs(alone)
        for one, other in zip(together, alone, strict=True):
            assert one.outputs[1].cumulative_logprob == pytest.approx(one_sum(other.outputs[1]), rel=1e-4)
    assert {len(each.outputs) for each in alone} == {2}
    assert alone[0].outputs[0].text != alone[0].outputs[1].text, "continuations of one prompt differ"


def one_sum(output: Any) -> float:
    return sum(entry.logprob for entry in output.logprobs)


@pytest.mark.parametrize(
    ("kind", "chance"),
    [("mha", {}), ("rcmha", {"temperature": 5.0, "top_p": 0.9, "seed": 11})],
    ids=["greedy", "drawn"],
)
def test_texts_and_caches_are_the_server_s(kind, chance, monkeypatch):
    """Tokens, text, log probabilities and what the cache did, prompts being read in chunks by both."""
    monkeypatch.setattr("attnzoo.models.sequences.PROMPT_CHUNK", 12)
    lm, texts = lm_of(kind), [TEXTS[3] * 2, TEXTS[1], TEXTS[0]]
    settings = EngineConfig(checkpoint="none", max_num_seqs=1, max_batched_tokens=13, prefix_cell=12, cache_bounds=None)
    engine = Engine(settings, model=lm.model, tokenizer=lm.tokenizer)
    for cache in POLICIES:
        params = SamplingParams(max_tokens=10, logprobs=2, stop=("zzz",), **chance)
        served = engine.generate(texts, params, None if cache["policy"] == "full" else cache)
        mine = lm.generate(texts, max_new_tokens=10, logprobs=2, stop="zzz", cache=cache, **chance)
        for one, other in zip(mine, served, strict=True):
            assert (list(one.token_ids), one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
            last = other.last
            assert (one.cache.policy, one.cache.kept_tokens) == (last.policy, last.kept_tokens)
            assert (one.cache.kv_bytes, one.cache.kv_bytes_full) == (last.kv_bytes, last.kv_bytes_full)
            assert one.cache.not_compressed == last.not_compressed
            found = [(x.token, x.offset) for x in one.logprobs]
            assert found[: len(other.logprobs)] == [(x.token, x.offset) for x in other.logprobs]
    assert mine[0].cache.kv_bytes < mine[0].cache.kv_bytes_full, "nothing was compressed"


def test_old_names_of_options_are_keywords_too():
    lm = lm_of("mha")
    for policy, old, new, value in (("d2o", "votes", "merge_counts", True), ("think", "retail", "repack_every", 3)):
        expected = lm.generate(TEXTS[3], max_new_tokens=6, cache={"policy": policy, new: value})
        with pytest.warns(FutureWarning, match=f"{old} is now called .*{new}"):
            assert lm.generate(TEXTS[3], max_new_tokens=6, cache=policy, **{old: value}) == expected


def test_a_cache_is_named_described_or_given():
    lm, options = lm_of("mha"), {"max_new_tokens": 6}
    named = lm.generate(TEXTS[3], cache="streaming", keep_ratio=0.5, min_tokens=0, **options)
    assert named.cache.policy == "streaming"
    assert named.cache.kept_tokens < named.prompt_tokens
    described = {"policy": "streaming", "keep_ratio": 0.5, "min_tokens": 0}
    assert lm.generate(TEXTS[3], cache=described, **options) == named
    assert lm.generate(TEXTS[3], cache={"policy": "streaming", "min_tokens": 0}, keep_ratio=0.5, **options) == named
    assert (
        lm.generate(TEXTS[3], cache=build_cache("streaming", {"keep_ratio": 0.5, "min_tokens": 0}), **options) == named
    )
    exact = lm.generate(TEXTS[3], **options)
    assert lm.generate(TEXTS[3], cache="full", **options) == exact != named
    own = DecoderLM(dataclasses.replace(lm.config, cache=described)).eval()
    own.load_state_dict(lm.model.state_dict())
    by_default = LanguageModel(own, tokenizer())
    assert by_default.generate(TEXTS[3], **options) == named, "the model's own choice, as in the server"
    assert by_default.generate(TEXTS[3], cache="full", **options) == exact


def test_seeds_reproduce_and_none_follows_torch():
    lm, hot = lm_of(), {"temperature": 2.0, "max_new_tokens": 12}
    one, again, other = (lm.generate(TEXTS[0], seed=seed, **hot) for seed in (5, 5, 6))
    assert one == again
    assert one.text != other.text
    torch.manual_seed(1)
    first, second = lm.generate(TEXTS[0], **hot), lm.generate(TEXTS[0], **hot)
    torch.manual_seed(1)
    assert lm.generate(TEXTS[0], **hot) == first != second
    several = lm.generate(TEXTS[0], seed=5, n=3, **hot)
    assert several.outputs[0] == one.outputs[0], "the first of several has the seed itself"
    assert several.outputs[1] == other.outputs[0]
    assert lm.generate(TEXTS[0], temperature=2.0, top_k=1, seed=5) == lm.generate(TEXTS[0])
    assert lm.generate(TEXTS[0], temperature=2.0, top_p=1e-9, seed=5) == lm.generate(TEXTS[0])


def test_a_text_ends_where_it_is_told():
    lm = lm_of()
    whole = lm.generate(TEXTS[0], max_new_tokens=20, ignore_eos=True)
    stop = whole.text[6:9]
    for given in (stop, [stop], ("never there", stop)):
        cut = lm.generate(TEXTS[0], max_new_tokens=20, ignore_eos=True, stop=given, logprobs=0)
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop"
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert len(cut.logprobs) == len(cut.token_ids) < 20
    token = whole.token_ids[4]
    at = whole.token_ids.index(token)
    ends = ending(lm, token)
    found = ends.generate([TEXTS[0], TEXTS[1]], max_new_tokens=20, logprobs=1)
    assert found[0].token_ids == whole.token_ids[: at + 1]
    assert found[0].text == tokenizer().decode(whole.token_ids[:at], start=False)
    assert found[0].finish_reason == "stop"
    assert [entry.token for entry in found[0].logprobs] == list(found[0].token_ids)
    assert found[1] == ends.generate(TEXTS[1], max_new_tokens=20, logprobs=1) or len(found[1].token_ids) > at
    assert ends.generate(TEXTS[0], max_new_tokens=20, ignore_eos=True) == whole


def test_a_stream_adds_up_and_no_stop_string_shows():
    lm = lm_of()
    whole = lm.generate(TEXTS[2], max_new_tokens=24, ignore_eos=True)
    starts = range(0, max(1, len(whole.text) - 4), 3)
    for stop in ((), *(whole.text[start : start + 4] for start in starts)):
        options = {"max_new_tokens": 24, "ignore_eos": True, "stop": stop}
        stream = lm.stream(TEXTS[2], cache="full", **options)
        shown = ""
        for piece in stream:
            assert piece
            shown += piece
            assert not stop or stop not in shown
        assert shown == stream.result.text
        assert stream.result == lm.generate(TEXTS[2], **options)
        assert list(stream) == []
    halted = lm.stream(TEXTS[0])
    next(halted)
    halted.close()
    assert list(halted) == []
    with pytest.raises(ValueError, match="the stream has not ended"):
        _ = halted.result


def test_logprobs_are_the_parallel_form_s():
    lm = lm_of("mha")
    drawn = lm.generate(TEXTS[0], max_new_tokens=8, temperature=1.5, seed=1, logprobs=3, ignore_eos=True)
    ids = [*drawn.prompt_token_ids, *drawn.token_ids]
    scored, other = lm.logprobs([ids, TEXTS[3]], batch_size=2)
    assert list(scored.token_ids) == ids
    assert scored.logprobs[0] is None
    assert scored.logprobs[-8:] == pytest.approx([entry.logprob for entry in drawn.logprobs], rel=1e-3, abs=1e-3)
    assert drawn.outputs[0].cumulative_logprob == pytest.approx(sum(scored.logprobs[-8:]), rel=1e-3)
    rows = lm.model(torch.tensor([ids]))[0, :-1].double().log_softmax(-1)
    assert scored.total == pytest.approx(float(rows.gather(1, torch.tensor(ids[1:])[:, None]).sum()), rel=1e-4)
    assert other.total == pytest.approx(lm.logprobs(TEXTS[3]).total, rel=1e-5)
    for entry in drawn.logprobs:
        values = [value for _, value in entry.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0]


def test_chat_continues_what_the_template_writes():
    lm = LanguageModel(small_model("rcmha"), chat_tokenizer())
    messages = [{"role": "user", "content": "a"}]
    ids = ChatEncoder.of(chat_tokenizer()).encode(messages)
    assert lm.chat(messages, max_new_tokens=6) == lm.generate(ids, max_new_tokens=6)
    free = lm.chat(messages)
    assert free.finish_reason == "stop" or free.prompt_tokens + len(free.token_ids) == MAX_LEN
    assert lm.chat(messages, GenerationConfig(max_new_tokens=3)).token_ids == free.token_ids[:3]
    stream = lm.stream_chat(messages, max_new_tokens=6, cache="streaming")
    assert "".join(stream) == lm.chat(messages, max_new_tokens=6, cache="streaming").text == stream.result.text
    with pytest.raises(ValueError, match="model has no chat template; continue a text with generate"):
        lm_of().chat(messages)
    for wrong, said in (
        ("Hello", "messages has type str; it must be a list such as"),
        (messages[0], "messages has type dict"),
        (None, "messages has type NoneType"),
        (iter(messages), "messages has type list_iterator"),  # else the template finds it read already
        ([], "messages is empty"),
        (["Hello"], r"messages\[0\] has type str; messages must be a list such as"),
        ([*messages, {"content": "a"}], r"messages\[1\].role=None must be a text"),
    ):
        with pytest.raises(ValueError, match=said):
            lm.chat(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refuses this conversation: system must come first"):
        lm.chat([*messages, {"role": "system", "content": "late"}])


@pytest.mark.parametrize("cache", [None, *POLICIES], ids=str)
def test_costs_are_those_of_the_model_and_bytes_those_measured(cache):
    lm = lm_of("mha")
    prompt = TEXTS[3]
    cost = lm.cost(prompt, cache=cache)
    assert cost == lm.cost(lm.encode(prompt), cache=cache) == lm.cost(len(lm.encode(prompt)), cache=cache)
    tokens = len(lm.encode(prompt))
    read, step = lm.model.cost(1, tokens, tokens), lm.model.cost(1, 1, tokens + 1)
    assert (cost.prompt.flops, cost.decode.flops) == (read.flops, step.flops)
    used = lm.generate(prompt, max_new_tokens=2, ignore_eos=True, cache=cache).cache
    assert cost.policy == used.policy
    assert step.bytes_moved - cost.decode.bytes_moved == step.state_bytes - cost.decode.kv_bytes
    if cache is None or cache["policy"] in ("full", "streaming", "d2o"):  # others hold pages, which count whole
        assert cost.decode.kv_bytes == used.kv_bytes
    page = PAGE * (step.state_bytes - lm.model.cost(1, 1, tokens).state_bytes)
    assert 0 <= cost.decode.kv_bytes - used.kv_bytes < page  # of all layers, with whole keys and values
    assert lm.cost(prompt, batch=3, cache=cache).decode.kv_bytes == 3 * cost.decode.kv_bytes
    if cache is not None and cache["policy"] == "streaming":
        assert lm.cost(prompt, cache="streaming", min_tokens=0).decode.kv_bytes < step.state_bytes


def test_a_configuration_holds_and_keywords_win():
    lm = lm_of()
    config = GenerationConfig(max_new_tokens=5, temperature=1.0, seed=2, stop="x")
    assert config.stop == ("x",)
    assert lm.generate(TEXTS[0], config) == lm.generate(TEXTS[0], max_new_tokens=5, temperature=1.0, seed=2, stop="x")
    assert lm.generate(TEXTS[0], config, temperature=0) == lm.generate(TEXTS[0], max_new_tokens=5, stop="x")
    assert len(lm.generate(TEXTS[0], ignore_eos=True).token_ids) == 16
    filled = lm.generate(TEXTS[0], max_new_tokens=None, ignore_eos=True)
    assert filled.prompt_tokens + len(filled.token_ids) == MAX_LEN
    uneven = lm.generate([TEXTS[0], TEXTS[3]], max_new_tokens=None, ignore_eos=True)
    assert uneven[0] == filled
    assert {each.prompt_tokens + len(each.token_ids) for each in uneven} == {MAX_LEN}
    with pytest.raises(dataclasses.FrozenInstanceError):
        filled.prompt = "other"


def test_every_field_is_an_option_and_every_typed_option_is_known():
    typed = set(GenerationOptions.__annotations__)
    of_caches = {name for policy in CACHES for name in option_names(policy)}
    of_attention = {each.name for each in dataclasses.fields(AttentionWish)}
    assert set(FIELDS) | of_attention <= typed
    assert typed - set(FIELDS) - of_attention <= of_caches
    assert not of_attention & (of_caches | set(FIELDS))
    assert set(FIELDS) & of_caches == {"seed"}, "a keyword would mean two things; seed is the text's"


def test_prompts_are_told_apart():
    assert as_batch("text") == (["text"], True)
    assert as_batch([1, 2]) == ([[1, 2]], True)
    assert as_batch(["text"]) == (["text"], False)
    assert as_batch([[1, 2], "text", torch.tensor([3])]) == ([[1, 2], "text", [3]], False)
    assert as_batch(torch.tensor([[1, 2], [3, 4]])) == ([[1, 2], [3, 4]], False)


def test_a_model_may_know_more_tokens_than_its_tokenizer():
    """They are never drawn, and have no part in probabilities."""
    lm = lm_of("mha")
    wide = DecoderLM(dataclasses.replace(lm.config, vocab_size=450)).eval().requires_grad_(False)
    state = {
        name: value for name, value in lm.model.state_dict().items() if name not in ("embedding.weight", "head.weight")
    }
    wide.load_state_dict(state, strict=False)
    wide.embedding.weight[:400], wide.head.weight[:400] = lm.model.embedding.weight, lm.model.head.weight
    wide.head.weight[400:] = 5 * lm.model.head.weight[:50]
    padded = LanguageModel(wide, tokenizer())
    assert without_logprobs([padded.generate("a", logprobs=1)])[0][1][0].token_ids == lm.generate("a").token_ids
    assert padded.logprobs(TEXTS[3]).total == pytest.approx(lm.logprobs(TEXTS[3]).total, rel=1e-5)


def test_what_it_says_of_itself():
    lm = lm_of()
    assert re.fullmatch(r"LanguageModel\('model', [\d,]+ parameters, float32 on cpu\)", repr(lm))
    assert (lm.device.type, lm.dtype, lm.config.max_positions) == ("cpu", torch.float32, MAX_LEN)


def test_what_runs_at_once_is_bounded(monkeypatch):
    """Rows by batch_size, continuations counted; and the cache of a prompt that is compressed as it is read."""
    lm, rows, held = lm_of("mha"), [], []
    inner = lm.model.extend_hidden

    def extend_hidden(tokens_BT: torch.Tensor, state: Any, counts_B: Any = None, edits: Any = None) -> Any:
        out = inner(tokens_BT, state, counts_B, edits=edits)
        rows.append(len(tokens_BT))
        held.append(out[1].nbytes())
        return out

    monkeypatch.setattr(lm.model, "extend_hidden", extend_hidden)
    lm.generate(TEXTS, batch_size=4, n=2, temperature=1.0, seed=0, max_new_tokens=2, ignore_eos=True)
    assert rows == [2, 4, 2, 4, 1, 2]  # prompts are read once for all their continuations
    monkeypatch.setattr("attnzoo.models.sequences.PROMPT_CHUNK", 7)
    held.clear()
    lm.generate([9] * 55, max_new_tokens=2, cache={"policy": "streaming", "max_tokens": 8, "prefill": "stream"})
    assert max(held) < lm.model.init_state(1, 55).nbytes() / 2
