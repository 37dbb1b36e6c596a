"""The measurement of compressed caches: metrics by hand, the search for a budget, the protocol, what is claimed."""

import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnzoo.kvcache import build_cache, compressed, ring_step
from attnzoo.models import CompiledDecode
from attnzoo.ops.common.cost import OpCost
from attnzoo.ops.evict_merge.cost import step_cost as merge_step_cost
from attnzoo.ops.paged_decode.cost import DecodeSizes, SegmentSizes, decode_cost
from attnzoo.planner.chips import CHIPS
from attnzoo.report import Report
from attnzoo.tasks.text import text_example
from scripts.arguments import KVPRESS as PEER
from scripts.bench_cache import PEER as SCRIPT
from scripts.bench_cache import main
from scripts.caches.budget import Fit, fit_budget
from scripts.caches.merge import merged, section_of
from scripts.caches.metrics import FidelityMeter, kl_divergence
from scripts.caches.models import prose, random_reader
from scripts.caches.peer import PRESSES, Exchange, PeerError, peer_logits, run_peer, work_items
from scripts.caches.peer_scores import agreement, compare_scores
from scripts.caches.protocol import ask, begin, force, forced_logits, prefill
from scripts.caches.quality import longest_prompt
from scripts.caches.retrieval import Score, keep_answered, make_batches, solved_tasks
from scripts.caches.roofline import attention_cost, step_cost
from scripts.caches.sections import text
from scripts.caches.settings import QUICK
from scripts.caches.speed import PROFILED, Speed, SpeedSizes, measure_speed, weight_bytes
from scripts.caches.step_parts import step_parts
from scripts.caches.table import memory_claims, parts_claims, peer_claim, speed_claims


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_kl_by_hand():
    full, other = logits(0.5, 0.25, 0.25), logits(0.125, 0.375, 0.5)
    found = kl_divergence(full.view(1, 1, 3), other.view(1, 1, 3))
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(1 / 2))
    assert kl_divergence(full[None, None], full[None, None] + 7.0).item() == pytest.approx(0.0, abs=1e-12)


def test_fidelity_by_hand():
    meter = FidelityMeter()
    same = logits(0.5, 0.25, 0.25).repeat(1, 98, 1)
    meter.add(same, same, torch.zeros(1, 98, dtype=torch.long))
    # Two tokens more: the likeliest differs, the text takes the one that has become less likely.
    full, other = logits(0.5, 0.25, 0.25).repeat(1, 2, 1), logits(0.25, 0.25, 0.5).repeat(1, 2, 1)
    meter.add(full, other, torch.zeros(1, 2, dtype=torch.long))
    found = meter.result()
    moved = 0.25 * math.log(2)
    assert found.kl_mean == pytest.approx(0.02 * moved)
    assert found.kl_p99 == pytest.approx(moved)
    assert found.agreement == pytest.approx(0.98)
    assert found.full_perplexity == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(2.0**0.98 * 4.0**0.02)


def test_a_meter_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens were measured"):
        FidelityMeter().result()


@pytest.mark.parametrize("budget", [99, 100, 149, 1034, 1035, 5000])
def test_the_fit_is_the_largest_ratio_within_the_budget(budget):
    def measure(ratio: float) -> int:
        return 85 + int(ratio * 100) * 10  # steps, and bytes that no ratio removes

    affordable = [ratio for ratio in (n / 64 for n in range(1, 65)) if measure(ratio) <= budget]
    assert fit_budget(measure, budget) == Fit(max(affordable), measure(max(affordable)))


def test_a_budget_below_everything_has_no_fit():
    assert fit_budget(lambda ratio: 10, 9) is None


def test_the_search_measures_few_ratios():
    asked = []
    fit_budget(lambda ratio: asked.append(ratio) or 0, 1)
    assert len(asked) <= 7


@pytest.fixture(scope="module")
def reader():
    return random_reader("mdha")


def test_forced_tokens_are_read_one_by_one_and_mean_the_same_as_at_once(reader):
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(256, (3, 53), generator=generator)
    whole_BTV = reader.model(tokens_BT)
    found = forced_logits(reader.model, tokens_BT, 31, build_cache("full", {}))
    assert found.shape == (3, 21, 256)
    torch.testing.assert_close(found, whole_BTV[:, 31:-1], rtol=1e-4, atol=1e-5)


def test_prefill_in_chunks_reports_its_bytes(reader):
    tokens_BT = torch.zeros(2, 50, dtype=torch.long)
    done = prefill(reader.model, tokens_BT, build_cache("full", {}), chunk=7)
    assert done.nbytes == done.peak_nbytes == done.state.nbytes()
    assert done.nbytes == reader.model.cost(2, 1, 50).state_bytes
    roomy = prefill(reader.model, tokens_BT, build_cache("full", {}), room=10)
    assert roomy.nbytes == reader.model.cost(2, 1, 60).state_bytes


def test_a_policy_that_keeps_less_takes_fewer_bytes_and_its_peak_is_seen(reader):
    tokens_BT = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    full = prefill(reader.model, tokens_BT, build_cache("full", {}))
    done = prefill(reader.model, tokens_BT, build_cache("streaming", {"keep_ratio": 0.5, "min_tokens": 0}))
    assert done.nbytes < 0.75 * full.nbytes
    assert done.peak_nbytes >= done.nbytes
    assert force(reader.model, done.state, tokens_BT[:, :3])[0].shape == (2, 3, 256)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full", {}),
        ("d2o", {"keep_ratio": 0.4, "min_tokens": 0}),
        ("d2o", {"keep_ratio": 0.4, "min_tokens": 0, "prefill": "stream"}),
        ("snapkv", {"keep_ratio": 0.4, "min_tokens": 0, "window": 8}),
        ("streaming", {"keep_ratio": 0.4, "min_tokens": 0}),
        ("d2o+think", {"keep_ratio": 0.5, "min_tokens": 0, "channel_ratio": 0.5, "window": 8}),
    ],
)
def test_a_shared_beginning_changes_no_bit(reader, name, options):
    model, policy = reader.model, build_cache(name, options)
    tokens_BT = torch.randint(256, (2, 103), generator=torch.Generator().manual_seed(1))
    begun = begin(model, tokens_BT[:, :90], policy, chunk=32, capacity=103)
    assert begun.tokens == 64
    prompts = [tokens_BT, tokens_BT[:, :90]]
    prompts.append(torch.cat([prompts[1], prompts[1][:, :13]], dim=1))
    # All of them are read before any goes on: they must not write over one another.
    shared = [prefill(model, prompt_BT, policy, chunk=32, begun=begun) for prompt_BT in prompts]
    alone = [prefill(model, prompt_BT, policy, chunk=32) for prompt_BT in prompts]
    for mine, other in zip(shared, alone, strict=True):
        told, expected = (force(model, done.state, tokens_BT[:, :4])[0] for done in (mine, other))
        assert torch.equal(told, expected)


def test_answers_under_the_full_cache_are_those_of_the_parallel_form(reader):
    model = reader.model
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 1, 12, 4)
    examples = batches["recall", 0][0]
    # A random model is never right: put what it says in place of the answers of some, so that both outcomes occur.
    told = ask(model, examples, build_cache("full", {}))
    seen = {where: [a.right for a in told.answers if a.condition == where] for where in ("inside", "outside", "second")}
    for number, example in enumerate(examples):
        first, second = example.questions[:2]
        text = torch.tensor([[*example.body, *first.tokens, *second.tokens]])
        guesses = model(text)[0].argmax(-1).tolist()
        end = len(example.body) + len(first.tokens)
        right = guesses[end - len(first.answer) - 1 : end - 1] == list(first.answer)
        later = guesses[text.shape[1] - len(second.answer) - 1 : -1] == list(second.answer)
        assert seen["inside"][number] == seen["outside"][number] == right
        assert seen["second"][number] == later


def test_what_is_read_before_compression_and_what_after(reader, monkeypatch):
    from scripts.caches import protocol

    prompts, forced = [], []

    def read(model, tokens_BT, policy, *, chunk, begun=None):
        prompts.append(tokens_BT.tolist())
        return prefill(model, tokens_BT, policy, chunk=chunk, begun=begun)

    def told(model, state, tokens_BT, *, together):
        forced.append((tokens_BT.tolist(), together))
        return force(model, state, tokens_BT, together=together)

    monkeypatch.setattr(protocol, "prefill", read)
    monkeypatch.setattr(protocol, "force", told)
    example = text_example(reader.encode, "recall", 300, 0)
    first, second = example.questions[:2]
    ask(reader.model, [example], build_cache("full", {}))
    # The last one is measured for its bytes.
    assert prompts == [[[*example.body, *first.prompt]], [list(example.body)], [[*example.body, *first.prompt]]]
    assert forced == [
        ([[*first.lead, *first.answer]], len(first.lead)),
        ([list(second.tokens)], len(second.tokens) - len(second.answer)),
        ([list(first.tokens)], len(first.tokens) - len(first.answer)),
    ]


def test_what_the_model_says_counts_as_right(reader):
    """An example whose answers are what the model itself goes on with."""
    from dataclasses import replace

    model = reader.model
    example = text_example(reader.encode, "recall", 300, 0)
    tokens = list(example.body)
    questions = []
    for question in example.questions[:2]:
        tokens += [*question.prompt, *question.lead]
        answer: list[int] = []
        for _ in question.answer:
            answer.append(int(model(torch.tensor([tokens + answer]))[0, -1].argmax()))
        tokens += answer
        questions.append(replace(question, answer=tuple(answer)))
    told = ask(model, [replace(example, questions=tuple(questions))], build_cache("full", {}))
    assert [(a.condition, a.right) for a in told.answers] == [("inside", True), ("second", True), ("outside", True)]


def test_accuracy_counts_tasks_and_conditions_alike():
    score = Score({("a", "inside", 0): [True] * 8, ("a", "second", 0): [False] * 2, ("b", "inside", 1): [True, False]})
    assert score.accuracy("a") == 0.5
    assert score.accuracy(condition="inside") == 0.75
    assert score.accuracy() == pytest.approx(0.5)
    assert score.accuracy(seed=1) == 0.5
    assert math.isnan(score.accuracy("c"))


def test_examples_are_kept_that_the_full_cache_answers_everywhere(reader):
    batches = make_batches(
        lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall", "passkey"], 2, 5, 2
    )
    score = Score()
    for (task, seed), groups in batches.items():
        for number, _ in enumerate(example for group in groups for example in group):
            for where in ("inside", "outside", "second"):
                wrong = (number == 1 and where == "second") or (task == "passkey" and seed == 1 and number < 4)
                score.right[task, where, seed].append(not wrong)
    kept = keep_answered(batches, score, count=2, batch=3)
    assert set(kept) == {("recall", 0), ("recall", 1)}
    for key, groups in kept.items():
        drawn = [example for group in batches[key] for example in group]
        found = [example for group in groups for example in group]
        assert sorted(map(drawn.index, found)) == [0, 2]


def test_tasks_must_be_solved_under_every_condition():
    where = ("inside", "outside", "second")
    right = {("a", c, 0): [True] for c in where} | {("b", c, 0): [c != "second"] for c in where}
    assert solved_tasks(Score(right), ["a", "b"], 0.9) == ["a"]


def speed(state: int, peak: int, seconds: float) -> Speed:
    return Speed(step_seconds=seconds, state_bytes=state, peak_bytes=peak, weight_bytes=100, batch=10, dtype="float32")


def test_sequences_in_a_budget_count_the_peak_of_the_last_one():
    assert speed(20, 100, 1.0).sequences_in(1000) == 1 + 900 // 20
    assert speed(20, 100, 1.0).sequences_in(99) == 0
    assert speed(100, 100, 1.0).sequences_in(1000) == 10


@pytest.mark.heavy
def test_steps_are_timed_in_both_forms_where_there_are_two(monkeypatch):
    said: list[str] = []
    steps: list[int] = []
    compiled_call = CompiledDecode.__call__
    monkeypatch.setattr(CompiledDecode, "__call__", lambda *given: steps.append(1) or compiled_call(*given))
    policies = {"streaming": build_cache("streaming"), "think": build_cache("think")}
    sizes = SpeedSizes(context=128, batches=(2,), steps=1, turns=1, chunk=64)
    found = measure_speed(random_reader().model, policies, sizes, said.append)[2]
    assert len(steps) == 1 + sizes.steps + PROFILED
    assert [line for line in said if "turn 1 of 1, streaming, compiled: " in line]
    assert found["streaming"].step_seconds <= found["streaming"].operator_seconds
    assert found["think"].operator_seconds is None
    assert any("think is not compiled: layer 0" in line for line in said)


def test_speed_claims_are_computed():
    speeds = {"full": speed(100, 100, 4.0), "d2o": speed(20, 40, 1.0), "think": speed(75, 100, 4.5)}
    found = {claim.name: claim for claim in speed_claims("decode", speeds) + memory_claims(speeds)}
    ratio = found["decode: d2o, times the full cache's tokens/s"]
    assert (ratio.measured, ratio.holds) == (4.0, True)
    (share,) = (claim for name, claim in found.items() if "that its bytes allow" in name)
    assert share.measured == pytest.approx(4.0 / (1100 / 300), abs=1e-4)
    assert not found["decode: think, times the full cache's tokens/s"].holds
    assert found["think: share of the full cache's bytes that is gone"].measured == 0.25
    sequences = found["d2o: sequences in the memory of the full cache's, prefill peak counted"]
    assert sequences.measured == pytest.approx((1 + 960 // 20) / 10)


def test_parts_of_a_step_are_all_of_it():
    weight, keys, x = torch.randn(300, 300), torch.randn(8, 300, 300), torch.randn(300, 300)

    def run() -> None:
        for _ in range(3):
            torch.mm(x, weight)
            torch.bmm(keys, keys)
            keys.exp()

    begin = time.perf_counter()
    run()
    parts = step_parts(run, 3, seconds := (time.perf_counter() - begin) / 3)
    assert parts.weights + parts.entries + parts.rest == pytest.approx(seconds)
    assert min(parts.weights, parts.entries) > 0
    none = step_parts(lambda: None, 1, 2.0)
    assert (none.weights, none.entries, none.rest) == (0.0, 0.0, 2.0)


def test_a_slow_baseline_is_told():
    name = "decode: full cache's bytes/s over the best policy's"
    fair = {"full": speed(100, 100, 1.1), "d2o": speed(20, 40, 0.3)}
    slow = {"full": speed(100, 100, 11.0), "d2o": speed(20, 40, 0.3)}
    assert next(claim for claim in speed_claims("decode", fair) if claim.name == name).holds
    assert not next(claim for claim in speed_claims("decode", slow) if claim.name == name).holds


def test_the_roofline_by_hand():
    attention = OpCost(bytes_read=1500, bytes_written=100, flops=4800)
    cost = step_cost(weight_bytes=2000, weights=1000, attention=attention, batch=4)
    assert cost.nbytes == 2000 + 1600
    assert cost.flops == 4 * 2 * 1000 + 4800
    assert cost.seconds(CHIPS["H100"]) == pytest.approx(cost.nbytes / 3.35e12)


def test_a_full_cache_in_the_roofline_by_hand(reader):
    state = reader.model.init_state(1, 40)
    _, state = reader.model.extend(torch.arange(37)[None], state)
    cost = attention_cost(reader.model, state, 3)
    layers, entries = 2, 38  # the new token's is read too
    assert cost.bytes_read == layers * 3 * (entries * (2 * 2 * 16 * 4 + 8) + 4 * 16 * 4 + 8)
    assert cost.bytes_written == layers * 3 * 4 * 16 * 4
    assert cost.flops == layers * 3 * 2 * 4 * entries * 32


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("d2o", {"keep_ratio": 0.3, "min_tokens": 0}),
        ("think", {"channel_ratio": 0.5}),
        ("d2o+think", {"keep_ratio": 0.5, "min_tokens": 0, "channel_ratio": 0.5, "merge_counts": True}),
        ("streaming", {"keep_ratio": 0.3, "min_tokens": 0}),
    ],
)
def test_the_roofline_counts_what_operations_are_given(reader, policy, options, monkeypatch):
    """The costs of the operations themselves for what a decode step passes to them."""
    expected = []
    decode, merge = compressed.paged_decode, ring_step.evict_merge_step

    def watched_decode(q, prefix, tail, **rest):
        parts = [
            SegmentSizes(
                slots=part.slots,
                key_dim=part.keys_BKSC.shape[3],
                value_dim=part.values_BKSV.shape[3],
                position_heads=2 if part is prefix and policy != "think" else 1,
                merge_counts=part is prefix and part.log_counts_BKS is not None,
                channels=part.channels_BKC is not None,
                value_channels=part.value_channels_BKV is not None,
            )
            for part in (prefix, tail)
        ]
        probe = rest["probe_BKC"]
        sizes = {"batch": 3, "tokens": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "width": 4}
        sizes |= {
            "probe_dim": 0 if probe is None else probe.shape[2],
            "accumulated_attention": rest["accumulated_attention"],
        }
        expected.append(decode_cost(DecodeSizes(segments=tuple(parts), **sizes)))
        return decode(q, prefix, tail, **rest)

    def watched_merge(slots, **rest):
        dims = {"key_dim": slots.keys_BKPC.shape[3], "value_dim": slots.values_BKPV.shape[3], "width": 4}
        count, merge_counts = slots.keys_BKPC.shape[2], slots.merge_counts_BKP is not None
        if rest["rule"].kind != "drop":
            expected.append(merge_step_cost(batch=3, kv_heads=2, slots=count, merge_counts=merge_counts, **dims))
        return merge(slots, **rest)

    tokens = torch.randint(256, (1, 96))
    state = prefill(reader.model, tokens, build_cache(policy, options), chunk=96).state
    cost = attention_cost(reader.model, state, 3)
    monkeypatch.setattr(compressed, "paged_decode", watched_decode)
    monkeypatch.setattr(ring_step, "evict_merge_step", watched_merge)
    with torch.no_grad():
        reader.model.extend(tokens[:, :1], state)
    for name in ("bytes_read", "bytes_written", "flops"):
        assert getattr(cost, name) == sum(getattr(one, name) for one in expected)


def test_weight_bytes_count_a_tied_table_once(reader):
    assert weight_bytes(reader.model) == sum(p.nbytes for p in reader.model.parameters())


def test_prose_is_as_long_as_asked(reader):
    assert prose(reader.encode, 2, 300).shape == (2, 300)
    with pytest.raises(ValueError, match="more than Python's documentation has"):
        prose(reader.encode, 10**6, 100)


ECHO = """
import json, sys
work = json.load(open(sys.argv[1]))
right = [[index % 2 == 0 for index in range(len(item["spans"]))] for item in work["items"]]
found = {"right": right, "nbytes": [len(item["prompt"]) for item in work["items"]]}
json.dump({press: found for press in work["presses"]}, open(sys.argv[2], "w"))
"""


def test_the_peer_gets_the_same_tokens_and_its_answers_find_their_conditions(tmp_path):
    reader = random_reader()
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 2, 2, 2)
    script = tmp_path / "echo.py"
    script.write_text(ECHO, encoding="utf-8")
    scores = run_peer(Exchange(Path(sys.executable), script, tmp_path), batches, 0.25)
    assert set(scores) == set(PRESSES)
    score = scores["SnapKVPress"]
    assert score.accuracy(condition="inside") == score.accuracy(condition="outside") == 1.0
    assert score.accuracy(condition="second") == 0.0
    work = json.loads((tmp_path / "work.json").read_text(encoding="utf-8"))
    assert work["ratio"] == 0.75
    assert len(work["items"]) == 8
    for item in work_items([batches["recall", 0][0][0]]):
        first, second = batches["recall", 0][0][0].questions[:2]
        answers = [item["forced"][start:end] for start, end in item["spans"]]
        assert answers[0] == list(first.answer)
        assert answers[1:] in ([], [list(second.answer)])


def test_a_peer_that_fails_says_why(tmp_path):
    reader = random_reader()
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 1, 1, 1)
    script = tmp_path / "fails.py"
    script.write_text("import no_such_package_of_anyone", encoding="utf-8")
    with pytest.raises(PeerError, match="No module named 'no_such_package_of_anyone'"):
        run_peer(Exchange(Path(sys.executable), script, tmp_path), batches, 0.5)
    with pytest.raises(PeerError, match="cannot be run"):
        run_peer(Exchange(tmp_path / "nothing", script, tmp_path), batches, 0.5)


@pytest.mark.slow
@pytest.mark.skipif(PEER not in os.environ, reason=f"{PEER} names no Python of an environment with kvpress")
def test_kvpress_scores_and_answers_as_we_do(tmp_path):
    """Channels in ThinKPress's order, tokens with SnapKVPress's scores; nothing dropped, and answers are ours."""
    reader = random_reader()
    exchange = Exchange(Path(os.environ[PEER]), SCRIPT, tmp_path)
    exchange.export(reader.model)
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 1, 3, 3)
    found = compare_scores(exchange, longest_prompt(batches))
    assert found.channels == found.same_rank == 64
    assert found.difference < 1e-6
    texts_NT = prose(reader.encode, 2, 60)
    full_NTV = forced_logits(reader.model, texts_NT, 40, build_cache("full"))
    for press, logits_NTV in peer_logits(exchange, texts_NT, 40, 1.0).items():
        torch.testing.assert_close(logits_NTV, full_NTV, msg=press)


def test_a_part_of_d2o_must_bring_it_nearer():
    kl = {("d2o", 0.5): 0.2, ("d2o, half recent", 0.5): 0.3, ("d2o, nothing merged", 0.5): 0.1, ("streaming", 0.5): 0.0}
    rows = [{"policy": policy, "budget": budget, "KL mean": value} for (policy, budget), value in kl.items()]
    assert [claim.holds for claim in parts_claims("parts", rows)] == [True, False]


def test_the_peer_claim_needs_the_mean_of_the_best_press():
    assert peer_claim("text", 0.5, "SnapKVPress", 0.5).holds
    assert not peer_claim("text", 0.5, "SnapKVPress", 0.51).holds


@pytest.mark.heavy
def test_quick_runs_all_of_it(tmp_path, capsys):
    figure, report = tmp_path / "figure.png", tmp_path / "report.json"
    status = main(["--quick", "--roofline", "--figure", str(figure), "--json", str(report)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["quick"] is True
    assert content["figures"] == ["figure.png"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    tables = {row["table"] for row in content["rows"]}
    assert {"symbols", "symbols by seed", "text", "fidelity", "decode"} <= tables
    policies = {row["policy"] for row in content["rows"] if row["table"] == "text"}
    assert {"full", "d2o", "streaming", "random_tokens", "snapkv", "think", "random_channels"} <= policies
    full = next(row for row in content["rows"] if row["table"] == "fidelity" and row["policy"] == "full")
    assert full["KL mean"] == 0.0
    assert full["top-1 agreement"] == 1.0


@pytest.mark.heavy
def test_a_model_that_solves_no_task_is_measured_by_its_fidelity():
    settings = replace(QUICK, text=replace(QUICK.text, drawn=2))
    report = Report.start(command=["test"], quick=True)
    text(random_reader(), settings, report, None)
    assert {row["table"] for row in report.rows} == {"fidelity", "text: full cache"}
    assert {row["policy"] for row in report.rows if row["table"] == "fidelity"} >= {"full", "d2o", "think"}
    assert report.claims == []


@pytest.mark.heavy
def test_a_section_is_replaced_and_the_others_stay(tmp_path, capsys):
    path, figure = tmp_path / "report.json", tmp_path / "figure.png"
    options = ["--quick", "--json", str(path), "--figure", str(figure), "--update"]
    assert main([*options, "--sections", "symbols"]) == 0
    first = json.loads(path.read_text(encoding="utf-8"))
    first["rows"][1]["mark"], first["claims"][0]["measured"] = "old", 0.125
    path.write_text(json.dumps(first), encoding="utf-8")
    assert main([*options, "--sections", "speed"]) == 0
    both = json.loads(path.read_text(encoding="utf-8"))
    symbols = [row for row in both["rows"] if row["table"].startswith("symbols")]
    assert symbols == [row for row in first["rows"] if row["table"].startswith("symbols")]
    assert both["claims"] == first["claims"]
    assert [row["section"] for row in both["rows"] if row["table"] == "runs"] == ["symbols", "speed"]
    assert {"decode"} <= {row["table"] for row in both["rows"]}
    assert main([*options, "--sections", "symbols"]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))
    assert len(again["rows"]) == len(both["rows"])
    assert not any("mark" in row for row in again["rows"])
    capsys.readouterr()


def test_quick_and_real_numbers_are_not_mixed(tmp_path):
    path = tmp_path / "report.json"
    Report.start(quick=True).write(path)
    with pytest.raises(ValueError, match="quick=True, this run False"):
        merged(Report.start(), ["text"], path)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("symbols by seed", "symbols"), ("text: full cache", "text"), ("fidelity", "text"),
        ("text, 50% of the bytes: d2o against kvpress's TOVAPress, mean", "text"), ("decode", "speed"),
        ("parts", "parts"), ("parts, 50% of the bytes: KL of d2o against d2o, half recent", "parts"),
        ("kvpress: channels that think ranks as ThinKPress", "text"), ("d2o+think: share", "speed"),
    ],
)  # fmt: skip
def test_names_tell_their_section(name, section):
    assert section_of(name) == section


def test_scores_agree_when_they_are_the_same_up_to_a_factor():
    """Queries of 4 heads on 2 kv heads, scored here as kvpress documents it: means over window, group and keys."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 41, 8)
    think = queries.square().mean(2).view(1, 2, 2, 8).mean(2) * keys.square().mean(2)
    at = torch.arange(41)
    logits = queries @ keys.repeat_interleave(2, dim=1).mT / 8**0.5
    shares = logits.masked_fill(at > at[9:, None], -torch.inf).softmax(-1)[..., :9]
    pooled = F.avg_pool1d(shares.mean(2), 5, stride=1, padding=2).view(1, 2, 2, 9).mean(2)
    rank = think.argsort(-1).argsort(-1)
    found = {"queries.0": queries, "keys.0": keys, "rank.0": rank, "snapkv.0": pooled}
    same = agreement(found)
    assert (same.channels, same.same_rank, same.tokens) == (16, 16, 18)
    assert same.difference < 1e-6
    other = agreement({**found, "rank.0": rank.flip(-1), "snapkv.0": pooled.flip(-1)})
    assert other.same_rank < 16
    assert other.difference > 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sections", "symbol"], "unknown section 'symbol'; known: symbols, text, parts, speed"),
        (["--sections", "text", "--roofline"], "--roofline needs the bytes"),
        (["--update"], "--update needs --json"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.heavy
def test_a_peer_that_fails_does_not_lose_what_was_measured(tmp_path, capsys):
    report = tmp_path / "report.json"
    nothing = tmp_path / "python"
    options = ["--quick", "--sections", "text", "--run-dir", str(tmp_path / "run"), "--json", str(report)]
    assert main([*options, "--kvpress-python", str(nothing)]) == 1
    assert "kvpress is left out" in capsys.readouterr().err
    content = json.loads(report.read_text(encoding="utf-8"))
    assert {"text", "fidelity"} <= {row["table"] for row in content["rows"]}
    assert content["command"][-2:] == ["--kvpress-python", "ENVIRONMENT/bin/python"]
