"""`echo`: the prompt before the answer, with log probabilities of its tokens."""

import itertools

import httpx
import pytest

from attnzoo.models.score import score
from serve.request import SamplingParams
from tests.helpers.engines import D2O, make_engine, prompts, read_one_by_one, run_staggered
from tests.helpers.http_server import MODEL, events, post, running
from tests.helpers.penalty_oracle import soft

TEXT = "Hello, wörld \U0001f600 and others."


@pytest.fixture(scope="module")
def served():
    with running(max_batched_tokens=16, max_num_seqs=4) as served:
        soft(served[1].engine.model)
        yield served


def wanted(count=3, most=4):
    return SamplingParams(max_tokens=count, ignore_eos=True, prompt_logprobs=most)


@pytest.mark.parametrize("moves", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "cache"), [("mha", None), ("rcmha", None), ("linear", None), ("mha", D2O)])
def test_log_probabilities_are_those_of_the_parallel_form(kind, cache, moves):
    """Read in pieces, side by side with prompts that want none, set aside and read anew. Kills: places that are one
    off; pieces of another prompt; a piece that is lost; what was copied from earlier prompts."""
    settings = {} if cache is None else {"cache_bounds": {"full": None, "d2o": None}}
    engine, given = make_engine(kind, **settings), prompts(12, seed=6)
    soft(engine.model)
    seen = {}
    inner = engine.step

    def step():
        news = inner()
        seen.update({d.request_id: d.prompt_logprobs for d in news if d.prompt_logprobs is not None})
        return news

    engine.step = step
    work = [
        (prompt, wanted() if n % 3 else SamplingParams(max_tokens=3, ignore_eos=True)) for n, prompt in enumerate(given)
    ]
    run_staggered(engine, work, caches=None if cache is None else [cache] * 12, moves=moves)
    assert set(seen) == {str(n) for n in range(12) if n % 3}
    for name, found in seen.items():
        prompt = given[int(name)]
        (expected,) = score(engine.model, [prompt], engine.tokenizer.vocab_size)
        assert found[0] is None
        assert [x.token for x in found[1:]] == prompt[1:]
        assert [x.logprob for x in found[1:]] == pytest.approx(expected, abs=1e-4)
        for x in found[1:]:
            values = [value for _, value in x.top]
            assert len(values) == 4
            assert values == sorted(values, reverse=True)
            assert x.logprob <= values[0]
            assert all(value == x.logprob for token, value in x.top if token == x.token)


def test_pieces_that_are_read_again_are_noted(monkeypatch):
    """Where prompts cannot be read side by side, each is read alone from its beginning."""
    engine, given = make_engine("mha", max_batched_tokens=40), prompts(4, seed=9)
    failed = read_one_by_one(monkeypatch, engine)
    requests = [engine.add_request(str(n), prompt, wanted()) for n, prompt in enumerate(given)]
    scores = [request.scores for request in requests]
    while engine.has_work():
        engine.step()
    assert failed
    for prompt, found in zip(given, scores, strict=True):
        (expected,) = score(engine.model, [prompt], engine.tokenizer.vocab_size)
        assert [x.logprob for x in found.found[1:]] == pytest.approx(expected, abs=1e-4)


def test_the_prompt_is_computed_anew_and_is_there_for_others():
    engine = make_engine("mha", max_batched_tokens=64, prefix_cell=16)
    prompt = list(range(3, 40))
    plain = SamplingParams(max_tokens=2, ignore_eos=True)
    (first,) = engine.generate([prompt], wanted())
    assert first.last.cached_tokens == 0
    assert first.last.not_cached == "a request for log probabilities of its prompt computes all of it"
    assert first.tokens[:2] == engine.generate([prompt], plain)[0].tokens


def pieces(choice):
    """The parts of a text by its offsets."""
    offsets = [*choice["logprobs"]["text_offset"], len(choice["text"])]
    return [choice["text"][start:end] for start, end in itertools.pairwise(offsets)]


@pytest.mark.parametrize("as_tokens", [False, True])
def test_the_prompt_stands_before_the_answer(served, as_tokens):
    url, owner = served
    tokens = owner.engine.encode(TEXT)
    body = {
        "prompt": tokens if as_tokens else TEXT,
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": 2,
        "ignore_eos": True,
    }
    plain = post(url, **body).json()["choices"][0]
    echoed = post(url, echo=True, **body).json()["choices"][0]
    assert echoed["text"] == TEXT + plain["text"]
    logprobs = echoed["logprobs"]
    assert logprobs["tokens"][len(tokens) :] == plain["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][len(tokens) :] == pytest.approx(plain["logprobs"]["token_logprobs"])
    assert logprobs["top_logprobs"][0] is logprobs["token_logprobs"][0] is None
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"][1:])
    (expected,) = score(owner.engine.model, [tokens], owner.engine.tokenizer.vocab_size)
    assert logprobs["token_logprobs"][1 : len(tokens)] == pytest.approx(expected, abs=1e-4)
    found = pieces(echoed)
    assert "".join(found) == echoed["text"]
    spelled = [(piece, token) for piece, token in zip(found, logprobs["tokens"], strict=True) if piece]
    assert sum(piece == token for piece, token in spelled) > len(tokens) // 2


def test_a_stream_says_the_same(served):
    url, _ = served
    body = {
        "prompt": [TEXT, "Other"],
        "n": 2,
        "max_tokens": 5,
        "temperature": 0.8,
        "seed": 3,
        "logprobs": 1,
        "echo": True,
    }
    whole = {c["index"]: c for c in post(url, **body).json()["choices"]}
    parts = {index: [] for index in whole}
    for chunk in events(post(url, stream=True, **body).text):
        for choice in chunk["choices"]:
            parts[choice["index"]].append(choice)
    for index, choice in whole.items():
        assert "".join(part["text"] for part in parts[index]) == choice["text"]
        assert choice["text"].startswith([TEXT, "Other"][index // 2])
        for name in ("tokens", "token_logprobs", "text_offset"):
            told = [x for part in parts[index] if part["logprobs"] for x in part["logprobs"][name]]
            expected = choice["logprobs"][name]
            assert told == (expected if name == "tokens" else pytest.approx(expected))


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_alone(served, stream):
    """max_tokens=0: nothing is answered, and nothing counts as answered."""
    url, owner = served
    body = {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    answer = post(url, **body, **({"stream_options": {"include_usage": True}} if stream else {}))
    if stream:
        *chunks, last = events(answer.text)
        (choice,), usage = [c for chunk in chunks for c in chunk["choices"]], last["usage"]
    else:
        (choice,), usage = answer.json()["choices"], answer.json()["usage"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert len(choice["logprobs"]["tokens"]) == usage["prompt_tokens"] == len(owner.engine.encode(TEXT))
    assert choice["logprobs"]["top_logprobs"] is None
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"]


def test_an_echo_without_log_probabilities(served):
    url, _ = served
    choice = post(url, prompt=TEXT, max_tokens=2, echo=True).json()["choices"][0]
    assert choice["text"].startswith(TEXT)
    assert choice["logprobs"] is None


def test_what_contradicts_is_refused(served):
    url, _ = served
    for body, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
    ):
        answer = post(url, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "echo": True}
    assert httpx.post(f"{url}/v1/chat/completions", json=chat).json()["error"]["param"] == "echo"


def test_lm_eval_over_http_says_what_it_says_in_process(served):
    """By lm-eval's own client, with this server as its tokenizer; it never writes a begin token. Kills: one place off;
    top log probabilities without the token's own."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from scripts.lm_adapter import AdaptedLM

    url, owner = served
    model, tokenizer = owner.engine.model, owner.engine.tokenizer
    pairs = [("Hello, ", "world"), ("Hello, ", "others are here"), ("The end of a", " text"), ("a b c", " d e f g")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    client = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=MODEL,
        tokenizer_backend="remote",
        max_length=owner.engine.max_model_len,
        batch_size=2,
    )
    there = client.loglikelihood(asked, disable_tqdm=True)
    (likeliest,) = owner.engine.generate(
        [client._encode_pair(*pairs[0])[0]], SamplingParams(max_tokens=4, ignore_eos=True)
    )
    here = AdaptedLM(model, tokenizer)._loglikelihood_tokens([(pair, *client._encode_pair(*pair)) for pair in pairs])
    greedy = client._loglikelihood_tokens([(pairs[0], client._encode_pair(*pairs[0])[0], likeliest.tokens)])
    assert greedy[0][1] is True
    assert [greedy for _, greedy in there] == [greedy for _, greedy in here]
    assert [value for value, _ in there] == pytest.approx([value for value, _ in here], abs=1e-4)
