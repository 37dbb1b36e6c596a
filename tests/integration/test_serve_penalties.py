"""What requests may say of logits and ends: penalties, biases, tokens that end a text, and a least length."""

import random

import httpx
import pytest

from attnzoo.models import Sampling
from attnzoo.models.sampling import TokenIdError
from serve.request import SamplingParams
from tests.helpers.drafting import speculating
from tests.helpers.engines import make_engine, prompts, run_staggered
from tests.helpers.http_server import MODEL, post, running
from tests.helpers.penalty_oracle import OPTIONS, greedy_tokens, soft
from tests.helpers.serving import TOKENS


@pytest.fixture(scope="module")
def url():
    with running() as (url, _):
        yield url


@pytest.mark.parametrize("moves", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["mha", "rcmha", "linear"])
def test_texts_are_those_of_the_loop(kind, moves):
    """In a batch with others, set aside and given their tokens once more. Kills: counts that forget tokens which are
    given once more, or count them twice."""
    draw, given = random.Random(3), prompts(20, seed=5)
    chosen = [draw.choice(list(OPTIONS.values())) for _ in given]
    work = [
        (prompt, SamplingParams(max_tokens=10, ignore_eos=True, **options))
        for prompt, options in zip(given, chosen, strict=True)
    ]
    engine = make_engine(kind, prefix_mib=0)
    soft(engine.model)
    expected = [greedy_tokens(engine.model, p, Sampling(**o), 10) for p, o in zip(given, chosen, strict=True)]
    assert run_staggered(engine, work, moves=moves) == expected
    assert expected != [greedy_tokens(engine.model, prompt, Sampling(), 10) for prompt in given]


@pytest.mark.parametrize("least", [0, 1, 4, 9, 12])
def test_no_token_ends_a_text_before_min_tokens(least):
    """Kills: one too early or too late; tokens of `stop_token_ids` or of the model that are not barred; barred with
    ignore_eos."""
    engine = make_engine("mha")
    for prompt in prompts(6, seed=7):
        plain = engine.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))[0]
        ends = (plain.tokens[3], plain.tokens[0])
        params = SamplingParams(max_tokens=12, min_tokens=least, stop_token_ids=ends, ignore_eos=True)
        (found,) = engine.generate([prompt], params)
        assert found.tokens == greedy_tokens(engine.model, prompt, Sampling(), 12, ends, least)
        ended = found.tokens[-1] in ends
        assert found.finish_reason == ("stop" if ended else "length")
        decode = engine.tokenizer.decoder(start=False)
        shown = found.tokens[:-1] if ended else found.tokens
        assert found.text == "".join(decode.push(token) for token in shown) + decode.finish()
        assert not set(found.tokens[:least]) & set(ends)


def test_the_models_own_end_is_barred_too():
    engine = make_engine("mha")
    (eos,) = engine.tokenizer.stop_ids
    certain = {"logit_bias": {eos: 100.0}}
    (at_once,) = engine.generate([[5, 6]], SamplingParams(max_tokens=8, **certain))
    assert (at_once.tokens, at_once.text, at_once.finish_reason) == ([eos], "", "stop")
    (later,) = engine.generate([[5, 6]], SamplingParams(max_tokens=8, min_tokens=3, **certain))
    assert later.tokens == [*greedy_tokens(engine.model, [5, 6], Sampling(), 3, [eos], 3), eos]
    (never,) = engine.generate([[5, 6]], SamplingParams(max_tokens=4, min_tokens=3, ignore_eos=True, **certain))
    assert never.tokens == [eos] * 4


def test_stop_strings_count_behind_min_tokens():
    """What stands before is not looked at again. Kills: a string that begins too early."""
    engine = make_engine("mha")
    (plain,) = engine.generate([[9, 8, 7]], SamplingParams(max_tokens=12, ignore_eos=True))
    decode = engine.tokenizer.decoder(start=False)
    pieces = [decode.push(token) for token in plain.tokens]
    at = next(n for n in range(2, 8) if pieces[n].strip() and pieces[n] not in "".join(pieces[:n]))
    for least, cut in ((0, True), (at, True), (at + 1, False)):
        params = SamplingParams(max_tokens=12, ignore_eos=True, stop=(pieces[at],), min_tokens=least)
        (found,) = engine.generate([[9, 8, 7]], params)
        again = pieces[at] in "".join(pieces[at + 1 :])
        assert (found.text == "".join(pieces[:at])) is (cut and least <= at)
        assert (found.finish_reason == "stop") is (cut or again)


def test_penalised_requests_are_not_drafted():
    """Drafted tokens are verified together, and penalties depend on each before."""
    prompt = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]
    params = SamplingParams(max_tokens=12, ignore_eos=True, frequency_penalty=0.3)
    engine = speculating("mha", lambda request, most: [7] * most, max_batched_tokens=32)
    soft(engine.model)
    (plain,) = engine.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))
    assert plain.last.accepted_tokens + plain.last.rejected_tokens > 0
    (found,) = engine.generate([prompt], params)
    assert found.tokens == greedy_tokens(engine.model, prompt, Sampling(frequency_penalty=0.3), 12)
    assert found.last.accepted_tokens == found.last.rejected_tokens == 0


@pytest.mark.parametrize(
    ("given", "param"),
    [({"logit_bias": {TOKENS + 9: 1.0}}, "logit_bias"), ({"stop_token_ids": (3, TOKENS + 9)}, "stop_token_ids")],
)
def test_tokens_outside_the_vocabulary_are_refused(given, param):
    engine = make_engine("mha")
    with pytest.raises(TokenIdError, match=rf"^{param} has token {TOKENS + 9}, which is outside the vocabulary") as e:
        engine.check([5], SamplingParams(**given))
    assert e.value.param == param


def test_over_http(url):
    """Biases are texts in JSON; both interfaces take everything; a wrong token is the field's fault, not the
    prompt's."""
    certain = {"logit_bias": {"70": 100}, "max_tokens": 3, "temperature": 0}
    first = post(url, prompt="Hello", logprobs=0, **certain).json()["choices"][0]
    assert first["logprobs"]["tokens"] == [first["logprobs"]["tokens"][0]] * 3
    ended = post(url, prompt="Hello", stop_token_ids=[70], **certain).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    sampled = {"temperature": 0.9, "seed": 4, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    answers = {post(url, prompt="Hello", frequency_penalty=0.2, min_tokens=2, **sampled).text[60:] for _ in range(2)}
    assert len({answer.partition('"choices"')[2].partition('"usage"')[0] for answer in answers}) == 1
    for given, param in (
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [999999]}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ):
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, **given}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), given
