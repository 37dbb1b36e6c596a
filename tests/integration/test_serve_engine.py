"""The engine against the plain generation loop: batching, chunking, moving slots and aborts change no token."""

import random

import pytest
import torch

from attnzoo.models import generate
from serve.engine import Engine
from serve.pools import SlotPool
from serve.request import ContextLengthError, Request, SamplingParams
from serve.scheduling import Release
from tests.helpers.engines import assert_empty, greedy, make_engine, prompts, run_staggered
from tests.helpers.serving import KINDS, MAX_LEN, TOKENS, small_model


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_alone_and_in_a_batch(kind):
    engine = make_engine(kind)
    draw = random.Random(3)
    work = [(prompt, greedy(draw.randrange(1, 20))) for prompt in prompts(50)]
    batched = run_staggered(engine, work)
    alone = [generate(engine.model, [p], max_new_tokens=params.max_tokens)[0] for p, params in work]
    assert batched == alone
    # The weights must be sharp enough, and the context matter enough, for this to mean something.
    assert len({tuple(tokens) for tokens in alone if len(tokens) > 3}) > 25


@pytest.mark.parametrize("kind", ["mha", "rcmha", "window"])
def test_prompts_of_one_length_that_are_read_side_by_side_in_pieces(kind):
    """The end of one and the whole of the next are one chunk, and end at the same position."""
    draw = random.Random(5)
    equal = [[draw.randrange(3, TOKENS) for _ in range(31)] for _ in range(16)]
    for budget in (40, 64):
        engine = make_engine(kind, max_num_seqs=8, max_batched_tokens=budget, itl_target_ms=None)
        batched = [each.tokens for each in engine.generate(equal, greedy(12))]
        assert batched == generate(engine.model, equal, max_new_tokens=12)


@pytest.mark.parametrize(
    ("kind", "part"), [("rcmha", "conv"), ("mixed", "memory"), ("mha", "keys"), ("mha", "lengths")]
)
def test_a_part_of_the_state_that_does_not_move_is_caught(kind, part, monkeypatch):
    """The test above must be able to fail: here one part of the state stays behind when a sequence moves."""
    work = [(prompt[:5], greedy(2 + index % 7)) for index, prompt in enumerate(prompts(20))]
    right = run_staggered(make_engine(kind), work)
    engine = make_engine(kind)
    release = engine.runner.release

    def lossy(request: Request, plan: Release) -> None:
        kept = {name: x.clone() for name, x in engine.runner.full.state.tensors().items() if part in name}
        assert kept
        release(request, plan)
        for name, tensor in engine.runner.full.state.tensors().items():
            for _, target in plan.moves if name in kept else ():
                tensor[target] = kept[name][target]

    with torch.inference_mode():
        monkeypatch.setattr(engine.runner, "release", lossy)
        assert run_staggered(engine, work) != right


def test_slots_that_are_not_exchanged_are_caught(monkeypatch):
    """A short prompt passes a long one and takes its place among those that decode. Without, a row holds another number
    of tokens than the plan says, which is seen before it is read."""
    work = [(prompt, greedy(2 + index % 7)) for index, prompt in enumerate(prompts(20))]
    right = run_staggered(make_engine(), work)
    exchanged = []
    monkeypatch.setattr(SlotPool, "exchange", lambda self, slots: exchanged.append(slots))
    monkeypatch.setattr("tests.helpers.engines.assert_empty", lambda engine: None)
    assert run_staggered(make_engine(), work) != right
    assert exchanged


def test_a_long_prompt_holds_up_neither_a_stream_nor_a_short_prompt():
    engine = make_engine(max_batched_tokens=50, max_num_seqs=3, prefix_cell=32)
    expected = {
        name: generate(engine.model, [prompt], max_new_tokens=count)[0]
        for name, prompt, count in (("stream", [5, 6], 40), ("long", [7] * 55, 5), ("short", [9, 8], 5))
    }
    engine.add_request("stream", [5, 6], greedy(40))
    engine.step()
    engine.pace.target_s, engine.pace._token_s = 1e-3, 1.0  # a slow machine: as little of a prompt as ever
    engine.add_request("long", [7] * 55, greedy(5))
    engine.add_request("short", [9, 8], greedy(5))
    tokens = {name: engine._requests[name].generated for name in expected}
    first = [{delta.request_id for delta in engine.step()} for _ in range(3)]
    assert first == [{"stream", "short"}, {"stream", "short"}, {"stream", "short", "long"}]
    while engine.has_work():
        engine.step()
    assert tokens == expected


def test_a_slot_that_is_not_emptied_is_caught(monkeypatch):
    work = [(prompt[:5], greedy(2 + index % 7)) for index, prompt in enumerate(prompts(20))]
    engine = make_engine("linear")
    right = run_staggered(engine, work)
    monkeypatch.setattr(engine.runner.full, "_empty", lambda slot: None)
    with pytest.raises(AssertionError, match="holds something"):
        run_staggered(engine, work)
    monkeypatch.setattr("tests.helpers.engines.assert_empty", lambda engine: None)
    assert run_staggered(engine, work) != right


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_count_of_zero_leaves_a_row_as_it_is(kind):
    model = small_model(kind)
    state = model.init_state(3, MAX_LEN)
    tokens = torch.randint(3, TOKENS, (3, 5))
    _, state = model.extend(tokens, state)
    before = {name: tensor[1].clone() for name, tensor in state.tensors().items()}
    _, state = model.extend(tokens[:, :2], state, torch.tensor([2, 0, 1]))
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor[1], before[name]), name


def test_drawn_text_depends_on_the_seed_alone():
    work = [
        (prompt, SamplingParams(max_tokens=9, temperature=30.0, top_p=0.95, top_k=40, seed=i, ignore_eos=True))
        for i, prompt in enumerate(prompts(20))
    ]
    together = run_staggered(make_engine(), work)
    alone = [run_staggered(make_engine(max_num_seqs=1), [one])[0] for one in work]
    assert together == alone
    other = [(prompt, SamplingParams(max_tokens=9, temperature=30.0, seed=99, ignore_eos=True)) for prompt, _ in work]
    assert run_staggered(make_engine(), other) != together


def test_without_a_seed_draws_differ():
    engine = make_engine()
    prompt = prompts(1)[0]
    params = SamplingParams(max_tokens=20, temperature=50.0, ignore_eos=True)
    first, second = engine.generate([prompt, prompt], params)
    assert first.tokens != second.tokens


def test_text_is_that_of_the_tokens_and_ends_at_a_stop_string():
    engine = make_engine()
    whole = engine.generate([prompts(1)[0]], greedy(20))[0]
    assert whole.finish_reason == "length"
    assert whole.text == engine.tokenizer.decode(whole.tokens)
    for cut in range(1, len(whole.text) - 3):
        stop = whole.text[cut : cut + 3]
        first = whole.text.index(stop)
        stopped = engine.generate([prompts(1)[0]], greedy(20, stop=(stop, "never in there")))[0]
        assert (stopped.text, stopped.finish_reason) == (whole.text[:first], "stop")


def test_eos_ends_a_sequence_unless_ignored():
    engine = make_engine("mha")
    prompt = next(p for p in prompts(300, seed=5) if _reaches_eos(engine, p))
    ended = engine.generate([prompt], SamplingParams(max_tokens=30))[0]
    assert ended.finish_reason == "stop"
    assert ended.tokens[-1] == engine.tokenizer.eos_id
    assert ended.tokens.count(engine.tokenizer.eos_id) == 1
    ignored = engine.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))[0]
    assert len(ignored.tokens) == 30
    assert ignored.tokens[: len(ended.tokens)] == ended.tokens


def _reaches_eos(engine: Engine, prompt: list[int]) -> bool:
    return len(prompt) < 12 and engine.tokenizer.eos_id in engine.generate([prompt], greedy(20))[0].tokens[:-1]


def test_logprobs_are_those_of_the_parallel_form():
    engine = make_engine()
    prompt = prompts(1, seed=2)[0]
    done = engine.generate([prompt, prompts(2)[1]], greedy(8, logprobs=3))[0]
    expected = engine.model(torch.tensor([prompt + done.tokens]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert [x.token for x in done.logprobs] == done.tokens
    for row, entry in zip(expected, done.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=2e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
    texts = [engine.tokenizer.decode(done.tokens[:index]) for index in range(len(done.tokens))]
    complete = [index for index, text in enumerate(texts) if "\ufffd" not in text]
    assert complete
    assert [done.logprobs[index].offset for index in complete] == [len(texts[index]) for index in complete]


def test_abort_frees_the_slot_at_once_and_disturbs_nobody():
    engine = make_engine()
    work = prompts(12, seed=4)
    expected = [generate(engine.model, [p], max_new_tokens=10)[0] for p in work]
    tokens = {}
    for index, prompt in enumerate(work):
        engine.add_request(str(index), prompt, greedy(10))
        tokens[str(index)] = engine._requests[str(index)].generated
    aborted = {"0", "2", "5", "11"}
    for step in range(200):
        for victim in sorted(aborted):
            if step == int(victim) and victim in engine._requests:
                running = engine.scheduler.num_running
                waiting = engine.scheduler.num_waiting
                assert engine.abort(victim)
                assert engine.scheduler.num_running + engine.scheduler.num_waiting == running + waiting - 1
                assert not engine.abort(victim)
        engine.step()
    assert_empty(engine)
    for index in range(len(work)):
        if str(index) not in aborted:
            assert tokens[str(index)] == expected[index]


def test_reported_bytes_are_those_of_a_state_of_that_length():
    for kind in KINDS:
        engine = make_engine(kind)
        prompt = prompts(3)[2]
        done = engine.generate([prompt], greedy(7))[0]
        assert done.last.kv_bytes == engine.model.init_state(1, len(prompt) + 6).nbytes()


def test_prompts_that_do_not_fit_are_refused():
    engine = make_engine(max_model_len=MAX_LEN)
    with pytest.raises(ContextLengthError, match=r"context is 64 tokens, but 65 were asked for \(60 in the prompt"):
        engine.add_request("a", [5] * 60, SamplingParams(max_tokens=5))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.add_request("a", [TOKENS], SamplingParams(max_tokens=5))
    with pytest.raises(ValueError, match="empty"):
        engine.add_request("a", [], SamplingParams(max_tokens=5))
    engine.add_request("a", [5] * 59, greedy(5))
    while engine.has_work():
        engine.step()
    assert_empty(engine)


def test_the_step_of_an_idle_engine_does_nothing():
    assert make_engine().step() == []
