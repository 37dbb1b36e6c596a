"""Prompts with embeddings in the engine: batches, chunks, caches and cancellation change no token."""

import random

import pytest
import torch

from attnzoo.kvcache import CACHES, build_cache
from attnzoo.models import DecoderLM, Embedded, EmbeddedPrompt, generate
from serve.engine import Engine
from serve.request import ContextLengthError, SamplingParams
from tests.helpers.engines import assert_empty, greedy, make_engine, prompts, read_one_by_one, run_staggered
from tests.helpers.serving import KINDS

POLICIES = [
    {"policy": "full"},
    {"policy": "d2o", "keep_ratio": 0.5, "min_tokens": 0},
    {"policy": "d2o", "max_tokens": 12},
    {"policy": "think", "channel_ratio": 0.5, "window": 4},
    {"policy": "d2o+think", "keep_ratio": 0.6, "min_tokens": 0, "channel_ratio": 0.5, "window": 2},
    {"policy": "snapkv", "max_tokens": 10, "window": 3},
    {"policy": "streaming", "keep_ratio": 0.5, "min_tokens": 0, "sinks": 1},
]


def mixed_prompts(model: DecoderLM, count: int) -> list[EmbeddedPrompt]:
    """Embeddings at the beginning, at the end, and over the borders of chunks."""
    draw, made = random.Random(5), torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        parts: list = []
        for _ in range(draw.choice([1, 2, 3])):
            parts.append([draw.randrange(3, 400) for _ in range(draw.choice([0, 1, 4, 9]))])
            rows = draw.choice([1, 2, 7, 13])
            parts.append(Embedded(torch.randn(rows, model.config.model_dim, generator=made) * 0.3))
        found.append(EmbeddedPrompt([*parts, [draw.randrange(3, 400) for _ in range(draw.choice([0, 3]))]]))
    return found


@torch.inference_mode()
def run_directly(model: DecoderLM, prompt: EmbeddedPrompt, count: int, choice: dict) -> list[int]:
    """Greedy tokens of the model on embeddings, without a server and without the loop of `generate`."""
    options = {key: value for key, value in choice.items() if key != "policy"}
    cache = None if choice["policy"] == "full" else build_cache(choice["policy"], options)
    x_1TD = model.embed(torch.tensor([[max(token, 0) for token in prompt]]))
    for part in prompt.embedded:
        x_1TD[0, part.start : part.stop] = part.rows_MD
    state = model.init_state(1, len(prompt) + (count if cache is None else 0), cache=cache)
    hidden_BTD, state = model.extend_hidden(x_1TD, state)
    state = model.compress(state)
    found = []
    for _ in range(count):
        found.append(int(model.logits(hidden_BTD[:, -1]).argmax()))
        hidden_BTD, state = model.extend_hidden(torch.tensor([found[-1:]]), state)
    return found


@pytest.mark.parametrize(("kind", "most"), [("mha", 9), ("rcmha", 9), ("mixed", 9), ("rcmha", 64)])
def test_every_policy_continues_embeddings_as_the_model_does_beside_plain_prompts(kind, most):
    engine = make_engine(
        kind, max_num_seqs=6, max_batched_tokens=most, cache_bounds={p["policy"]: None for p in POLICIES}, max_caches=3
    )
    given = mixed_prompts(engine.model, 21)
    work, caches, wanted = [], [], []
    for index, (prompt, plain) in enumerate(zip(given, prompts(21, seed=4), strict=True)):
        choice, count = POLICIES[index % len(POLICIES)], 2 + index % 9
        options = {key: value for key, value in choice.items() if key != "policy"}
        work += [(prompt, greedy(count)), (plain, greedy(count))]
        caches += [choice, choice]
        wanted.append(run_directly(engine.model, prompt, count, choice))
        cache = build_cache(choice["policy"], options)
        wanted.append(generate(engine.model, [plain], max_new_tokens=count, cache=cache)[0])
    assert run_staggered(engine, work, caches=caches) == wanted
    assert engine.runner.compact == {}
    others = [(EmbeddedPrompt([[5] * len(p)]) if isinstance(p, EmbeddedPrompt) else p, params) for p, params in work]
    assert run_staggered(engine, others, caches=caches) != wanted, "the embeddings do not matter"


@pytest.mark.parametrize("policy", [name for name in CACHES if name not in ("full", "none")])
def test_every_registered_policy_takes_them(policy):
    """Read in one chunk, also by policies that compress while they read."""
    kind = CACHES.get(policy).Config.__dataclass_fields__
    choice = {"policy": policy} | ({"keep_ratio": 0.6} if "keep_ratio" in kind else {})
    engine = make_engine("mha", max_batched_tokens=64, cache_bounds={policy: None})
    for prompt in mixed_prompts(engine.model, 3):
        wanted = run_directly(engine.model, prompt, 6, choice)
        assert engine.generate([prompt], greedy(6), cache=choice)[0].tokens == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_tokens_give_the_text_of_the_tokens(kind):
    """All of them or some, torch.equal by the ids that follow; the log probabilities are equal too."""
    engine = make_engine(kind)
    params = greedy(5, logprobs=2)
    for prompt in prompts(5, seed=2):
        cut = len(prompt) // 2
        rows = engine.model.embedding.weight[prompt[cut:]].clone()
        alone = engine.generate([prompt], params)[0]
        embedded = engine.generate([EmbeddedPrompt([prompt[:cut], Embedded(rows)])], params)[0]
        assert (embedded.tokens, embedded.logprobs) == (alone.tokens, alone.logprobs)
        assert embedded.last.prompt_tokens == len(prompt)
        assert (embedded.last.kv_bytes, embedded.last.kept_tokens) == (alone.last.kv_bytes, alone.last.kept_tokens)


def test_rows_of_several_choices_and_given_up_prompts_leave_nothing_behind():
    engine = make_engine("rcmha", cache_bounds={"d2o": None})
    (prompt,) = mixed_prompts(engine.model, 1)
    prompt = EmbeddedPrompt([prompt.ids[:1] if prompt.ids[0] >= 0 else [5], *prompt.embedded, [5] * 20])
    seeds = [SamplingParams(max_tokens=6, temperature=20.0, seed=seed, ignore_eos=True) for seed in range(3)]
    alone = [engine.generate([prompt], params)[0].tokens for params in seeds]
    assert len(set(map(tuple, alone))) == 3
    for index, params in enumerate(seeds):
        engine.add_request(str(index), prompt, params)
    engine.add_request("long", prompt, greedy(30))
    engine.add_request("compressed", prompt, greedy(30), cache=engine.choose_cache({"policy": "d2o"}))
    kept = {name: engine._requests[name].generated for name in ("0", "1", "2")}
    engine.step()
    assert engine.abort("long")
    for _ in range(3):
        engine.step()
    assert engine.abort("compressed")
    while engine.has_work():
        engine.step()
    assert [kept[str(index)] for index in range(3)] == alone
    assert_empty(engine)


def test_a_failed_step_reads_embeddings_again(monkeypatch):
    """Rows that were read together are read one by one, from their beginning."""
    engine = make_engine("rcmha", max_batched_tokens=12)
    given = mixed_prompts(engine.model, 3)
    wanted = [run_directly(engine.model, prompt, 4, {"policy": "full"}) for prompt in given]
    failed = read_one_by_one(monkeypatch, engine)
    assert run_staggered(engine, [(prompt, greedy(4)) for prompt in given], seed=2) == wanted
    assert failed


def test_what_does_not_fit_is_refused_before_it_runs():
    engine: Engine = make_engine("mha")
    wide = EmbeddedPrompt([[5], Embedded(torch.ones(2, 31))])
    with pytest.raises(ValueError, match=r"embeddings of shape \(2, 31\) in the prompt; this model's have 32 numbers"):
        engine.add_request("wide", wide, greedy(1))
    long = EmbeddedPrompt([[5], Embedded(torch.ones(63, 32))])
    with pytest.raises(ContextLengthError, match=r"64 tokens, but 65 were asked for \(64 in the prompt"):
        engine.add_request("long", long, greedy(1))
    with pytest.raises(ValueError, match="prompt token 400 is outside the vocabulary of 400"):
        engine.add_request("id", EmbeddedPrompt([[400], Embedded(torch.ones(1, 32))]), greedy(1))
    with pytest.raises(ValueError, match="prompt token -1 is outside the vocabulary"):  # rows that were lost on the way
        engine.add_request("lost", list(EmbeddedPrompt([[5], Embedded(torch.ones(1, 32))])), greedy(1))
    assert_empty(engine)
