"""The measurement of compressed caches: the protocol of what is read when, and the command that runs all of it."""

import json
from dataclasses import replace

import pytest
import torch

from attnzoo.kvcache import build_cache
from attnzoo.report import Report
from attnzoo.tasks.text import text_example
from scripts.bench_cache import main
from scripts.caches.merge import merged, section_of
from scripts.caches.models import prose, random_reader
from scripts.caches.protocol import ask, begin, force, forced_logits, prefill
from scripts.caches.retrieval import make_batches
from scripts.caches.sections import text
from scripts.caches.settings import QUICK


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


def test_prose_is_as_long_as_asked(reader):
    assert prose(reader.encode, 2, 300).shape == (2, 300)
    with pytest.raises(ValueError, match="more than Python's documentation has"):
        prose(reader.encode, 10**6, 100)


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
    path = tmp_path / "report.json"
    options = ["--quick", "--json", str(path), "--update"]
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
