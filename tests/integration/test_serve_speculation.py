"""Tokens that are drafted: the same text, whatever is drafted."""

import pytest
import torch

from attnzoo.models import DecoderLM
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import Request, SamplingParams
from tests.helpers.drafting import draft_always, sources, speculating
from tests.helpers.engines import assert_empty, greedy, make_engine, prompts, run_staggered
from tests.helpers.http_server import events, post, running
from tests.helpers.serving import KINDS, small_model, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_same_whatever_is_drafted(kind: str) -> None:
    given = [*prompts(3, seed=4), [7, 8, 9] * 4]
    work = [(prompt, greedy(9 + 4 * index, logprobs=2)) for index, prompt in enumerate(given)]
    expected = run_staggered(make_engine(kind), work)
    texts = {tuple(prompt): text for prompt, text in zip(given, expected, strict=True)}
    for name, source in {**sources(texts), "looked up": None}.items():
        engine = speculating(kind, source)
        assert run_staggered(engine, work) == expected, name
        computed_anew = speculating(kind, source, prefix_mib=0)
        assert run_staggered(computed_anew, work, moves=0.2) == expected, f"{name}, and set aside"


@pytest.mark.parametrize("kind", ["mha", "linear"])
def test_drafts_go_with_compiled_steps(kind: str) -> None:
    given = [*prompts(3, seed=4), [7, 8, 9] * 4]
    work = [(prompt, greedy(9 + 4 * index)) for index, prompt in enumerate(given)]
    expected = run_staggered(make_engine(kind), work)
    texts = {tuple(prompt): text for prompt, text in zip(given, expected, strict=True)}
    engine = speculating(kind, sources(texts)["half"], compile_decode=True)
    assert run_staggered(engine, work) == expected
    assert "spec_decode_num_accepted_tokens_total 0.0" not in engine.render_metrics().decode()


def finish(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[Request, list]:
    """One request alone: (it, its deltas)."""
    request, deltas = engine.add_request("a", prompt, params), []
    while engine.has_work():
        deltas += engine.step()
    assert_empty(engine)
    return request, deltas


def test_right_drafts_save_steps_and_are_counted() -> None:
    prompt = prompts(1)[0]
    plain = make_engine()
    request, _ = finish(plain, prompt, greedy(19))
    engine = speculating(source=sources({tuple(prompt): request.generated})["right"])
    fast, deltas = finish(engine, prompt, greedy(19))
    assert fast.generated == request.generated
    assert [delta.tokens for delta in deltas] == [*range(1, 20)], "a token was not told, or not in order"
    # 18 tokens after the first one, 6 a step.
    assert fast.drafts.times == 3
    assert (deltas[-1].accepted_tokens, deltas[-1].rejected_tokens) == (15, 0)
    told = engine.render_metrics().decode()
    for name, count in {"drafts": 3, "draft_tokens": 15, "accepted_tokens": 15}.items():
        assert f"attnzoo_spec_decode_num_{name}_total {count}.0" in told


def test_the_end_of_a_text_within_a_draft_is_its_end() -> None:
    prompt = prompts(1)[0]
    request, _ = finish(make_engine(), prompt, greedy(19))
    right = sources({tuple(prompt): request.generated})["right"]
    stop = make_engine().tokenizer.decode(request.generated[6:8])
    params = SamplingParams(max_tokens=19, ignore_eos=True, stop=(stop,), logprobs=1)
    slow, expected = finish(make_engine(), prompt, params)
    fast, found = finish(speculating(source=right), prompt, params)
    assert len(slow.generated) < 19, "the text was to end early"
    assert fast.generated == slow.generated
    assert "".join(delta.text for delta in found) == "".join(delta.text for delta in expected)
    assert found[-1].finish_reason == "stop"
    told = [entry.token for delta in found for entry in delta.logprobs]
    assert told == [entry.token for delta in expected for entry in delta.logprobs]


def test_log_probabilities_are_those_of_single_steps() -> None:
    prompt = prompts(1)[0]
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
    request, expected = finish(make_engine(), prompt, params)
    _, found = finish(speculating(source=sources({tuple(prompt): request.generated})["half"]), prompt, params)
    pairs = list(zip(_logprobs(found), _logprobs(expected), strict=True))
    assert len(pairs) == 12
    for one, other in pairs:
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def _logprobs(deltas: list) -> list:
    return [entry for delta in deltas for entry in delta.logprobs]


def test_what_is_drawn_is_not_drafted_nor_is_a_compressed_cache() -> None:
    asked: list[str] = []

    def note(request: Request, most: int) -> list[int]:
        asked.append(request.request_id)
        return []

    engine = speculating(source=note, cache_bounds={"think": {}})
    engine.add_request("drawn", [5, 6, 7], SamplingParams(max_tokens=4, temperature=1.0, seed=1))
    engine.add_request("thin", [5, 6, 7], greedy(4), cache=engine.choose_cache({"policy": "think"}))
    engine.add_request("greedy", [5, 6, 7], greedy(6))
    while engine.has_work():
        engine.step()
    assert set(asked) == {"greedy"}


def test_no_draft_is_longer_than_its_request_its_memory_or_the_step_has_room_for() -> None:
    most: list[int] = []

    def note(request: Request, allowed: int) -> list[int]:
        most.append(allowed)
        assert request.context + 1 + allowed <= request.room
        assert len(request.generated) + 1 + allowed <= request.params.max_tokens
        return [3] * allowed

    engine = speculating(source=note, most=16)
    finish(engine, [5, 6, 7], greedy(12))
    assert max(most) == 8, "nine tokens of a step, one of which is the newest"


def test_more_than_four_sequences_are_not_drafted() -> None:
    asked: list[str] = []
    engine = speculating(source=lambda request, most: asked.append(request.request_id) or [], max_num_seqs=5)
    for index in range(5):
        engine.add_request(str(index), [5, 6, 7], greedy(6 if index else 30))
    while engine.num_requests == 5:
        assert not asked, "five sequences, and one was drafted"
        engine.step()
    while engine.has_work():
        engine.step()
    assert set(asked) == {"0"}


def test_where_no_request_may_have_the_full_cache_it_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_lookup=5 drafts tokens of the full cache"):
        make_engine("mha", prompt_lookup=5, cache={"policy": "d2o", "keep_ratio": 0.5})


def test_bad_drafts_are_given_up() -> None:
    prompt = [11, 12, 13]
    request, _ = finish(make_engine(), prompt, greedy(60))
    engine = speculating(source=sources({tuple(prompt): request.generated})["wrong"])
    fast, deltas = finish(engine, prompt, greedy(60))
    assert fast.generated == request.generated
    assert fast.drafts.times == 8
    assert (deltas[-1].accepted_tokens, deltas[-1].rejected_tokens) == (0, 40)


def repeating() -> DecoderLM:
    """A model whose next token depends on the newest one alone, so that its text comes back to where it was."""
    model = small_model("rcmha")
    with torch.no_grad():
        for block in model.layers():
            for parameter in block.attention.parameters():
                parameter.zero_()
    return model


def test_a_text_that_repeats_itself_is_looked_up() -> None:
    plain, engine = (
        draft_always(
            Engine(EngineConfig(checkpoint="none", prompt_lookup=most), model=repeating(), tokenizer=tokenizer())
        )
        for most in (0, 5)
    )
    expected, _ = finish(plain, [7, 8, 9], greedy(60))
    request, _ = finish(engine, [7, 8, 9], greedy(60))
    assert request.generated == expected.generated
    assert request.drafts.accepted > 20
    assert request.drafts.accepted == request.drafts.drafted
    assert expected.drafts.times == 0


def test_usage_counts_drafted_tokens_over_http() -> None:
    with running("rcmha", prompt_lookup=5, max_num_seqs=4, max_batched_tokens=9) as (url, owner):
        draft_always(owner.engine, sources({(7, 8, 9): [3] * 40})["right"])
        body = {"prompt": [7, 8, 9], "max_tokens": 20, "ignore_eos": True, "temperature": 0}
        usage = post(url, **body).json()["usage"]
        streamed = events(post(url, **body, stream=True, stream_options={"include_usage": True}).text)[-1]["usage"]
    assert usage["completion_tokens_details"] == streamed["completion_tokens_details"]
    assert usage["completion_tokens_details"]["rejected_prediction_tokens"] == 40, "eight drafts, and no more"
    assert usage["completion_tokens"] == 20
