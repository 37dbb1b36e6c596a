"""Retrieval tasks: the same for the same seed, answers right by an independent reading of the context."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from attnzoo.tasks.examples import Question, answered
from attnzoo.tasks.symbols import (
    ALPHABET,
    SYMBOL_TASKS,
    VOCABULARY,
    decode,
    scatter,
    symbol_example,
    symbol_tokens,
)
from attnzoo.tasks.text import TEXT_TASKS, text_example
from train.data import DataConfig, prepare
from train.data.retrieval import TaskStream, task_document, task_sequence
from train.tokenizer import TokenizerConfig, ensure_tokenizer

SEEDS = range(20)


def byte_tokens(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def spelled(tokens) -> str:
    return bytes(tokens).decode("utf-8")


def value_of(name: str, body: str) -> str:
    """An interpreter of the variables in a context, assignments in the order in which they stand."""
    values: dict[str, str] = {}
    for target, source in re.findall(r"=(.)(.)", body):
        values[target] = values.get(source, source)
    return values[name]


def expected(task: str, sign: str, body: str) -> str:
    """The answer to a question about a context, found without the generator."""
    if task == "variables":
        return value_of(sign[1], body)
    if task == "words":
        counts = Counter(symbol for symbol in body if symbol.islower() == (sign == "*"))
        (first, often), (_, second) = counts.most_common(2)
        assert often > 2 * second
        return first
    length = {"passkey": 4, "needles": 2, "recall": 1}[task]
    found = re.findall(rf"{re.escape(sign)}([A-Z]{{{length}}})", body)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("task", SYMBOL_TASKS)
def test_symbol_answers_are_right_by_another_reading(task):
    for seed in SEEDS:
        example = symbol_example(task, 101, seed)
        body = decode(example.body)
        assert len(body) == 101
        assert len(example.questions) >= 2
        assert len({question.prompt for question in example.questions}) == len(example.questions)
        for question in example.questions:
            prompt, sign = decode(question.prompt), decode(question.lead)
            assert prompt == "?" + sign
            assert decode(question.answer) == expected(task, sign, body)


@pytest.mark.parametrize("task", SYMBOL_TASKS)
def test_symbol_examples_follow_from_their_seeds(task):
    assert symbol_example(task, 101, 3) == symbol_example(task, 101, 3)
    assert symbol_example(task, 101, 3).body != symbol_example(task, 101, 4).body


@pytest.mark.parametrize("task", ["passkey", "needles", "recall"])
def test_places_are_where_the_answer_stands(task):
    for seed in SEEDS:
        example = symbol_example(task, 101, seed)
        body = decode(example.body)
        for question in example.questions:
            assert "".join(body[p] for p in question.places) == decode(question.lead + question.answer)


def test_places_of_a_variable_are_its_whole_chain():
    example = symbol_example("variables", 101, 0)
    body = decode(example.body)
    assert {len(question.places) for question in example.questions} == {3, 6, 9}
    for question in example.questions:
        chain = "".join(body[p] for p in question.places)
        assert value_of(decode(question.lead)[1], chain) == decode(question.answer)


def test_needles_stand_anywhere():
    starts = [min(q.places) for seed in range(60) for q in symbol_example("passkey", 101, seed).questions]
    assert min(starts) < 10
    assert max(starts) > 85


def test_a_context_too_short_is_refused():
    with pytest.raises(ValueError, match=r"length=39 is too short for the 40 symbols"):
        symbol_example("recall", 39, 0)
    with pytest.raises(ValueError, match=r"length=50 is too short for the \d+ tokens"):
        text_example(byte_tokens, "needles", 50, 0)


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="unknown task 'passkeys'; known: passkey, needles"):
        symbol_example("passkeys", 101, 0)
    with pytest.raises(ValueError, match="unknown task 'passkeys'; known: passkey, needles"):
        text_example(byte_tokens, "passkeys", 601, 0)


def test_scatter_keeps_order_and_length():
    text, starts = scatter(["!aBB", "!cDD"], 31, random.Random(1))
    assert len(text) == 31
    assert [text[start : start + 4] for start in starts] == ["!aBB", "!cDD"]
    assert starts[0] + 4 <= starts[1]


def test_translation_keeps_everything_but_the_tokens():
    example = symbol_example("needles", 101, 0)
    other = example.translated([1000 + symbol for symbol in range(len(ALPHABET))])
    assert other.body == tuple(1000 + symbol for symbol in example.body)
    for mine, theirs in zip(example.questions, other.questions, strict=True):
        assert theirs.places == mine.places
        assert theirs.tokens == tuple(1000 + symbol for symbol in mine.tokens)


def test_answered_marks_answers_alone():
    questions = [Question(prompt=(1, 2), lead=(3,), answer=(4, 5)), Question(prompt=(6,), lead=(7,), answer=(8,))]
    tokens, asked = answered(questions)
    assert tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [t for t, a in zip(tokens, asked, strict=True) if a] == [4, 5, 8]


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_text_contexts_have_their_length_and_hold_the_answers(task):
    for seed in range(6):
        example = text_example(byte_tokens, task, 901, seed)
        assert len(example.body) == 901
        assert example == text_example(byte_tokens, task, 901, seed)
        body = spelled(example.body)
        for question in example.questions:
            lead, answer = spelled(question.lead), spelled(question.answer)
            if task in ("passkey", "needles", "recall"):
                assert spelled(example.body[p] for p in question.places).startswith(lead + answer)
                assert body.count(lead + answer) == 1
            elif task == "variables":
                assert text_value(lead.split()[-2], body) == answer.strip()
            else:
                kind = lead.split()[1]
                counts = Counter(re.findall(rf"Next {kind}: (\w+)\.", body))
                assert counts.most_common(1)[0] == (answer.strip(), 7)


def text_value(name: str, body: str) -> str:
    values: dict[str, str] = {}
    for variable, equal, value in re.findall(r"Let (\w+) be (equal to )?(\w+)\.", body):
        values[variable] = values[value] if equal else value
    return values[name]


TOKENS = list(range(100, 100 + len(ALPHABET)))


def test_training_sequences_are_the_same_for_any_number_of_ranks_and_after_a_restart():
    whole = TaskStream(1, TOKENS, 161, seed=5)
    first, second = whole.next(6, 0, 1), whole.next(6, 0, 1)
    for rank in range(3):
        parts = TaskStream(1, TOKENS, 161, seed=5)
        tokens_BT, targets_BT = parts.next(2, rank, 3)
        assert torch.equal(tokens_BT, first[0][2 * rank : 2 * rank + 2])
        assert torch.equal(targets_BT, first[1][2 * rank : 2 * rank + 2])
        resumed = TaskStream(1, TOKENS, 161, seed=5)
        resumed.load(parts.state())
        assert torch.equal(resumed.next(2, rank, 3)[0], second[0][2 * rank : 2 * rank + 2])
    assert not torch.equal(first[0], TaskStream(1, TOKENS, 161, seed=6).next(6, 0, 1)[0])


def test_targets_are_answers_and_the_values_of_assignments():
    values = 0
    for seed in SEEDS:
        sequence, targets = task_document(150, random.Random(seed), 1, TOKENS)
        assert len(sequence) == len(targets)
        text = " " + "".join(ALPHABET[token - 100] for token in sequence[1:])
        body, asked = text[: text.index("?")], text[text.index("?") :]
        wanted = {}
        if "=" in body:
            for found in re.finditer(r"=(.)(.)", body):
                wanted[found.end() - 1] = value_of(found[1], body)
            values += 1
        for found in re.finditer(r"\?([^?]+)", asked):
            sign = found[1][: found[1].index(found[1][0], 1)]
            start = len(body) + found.start() + 1 + 2 * len(sign)
            for place in range(start, len(body) + found.end()):
                wanted[place - 1] = text[place]
        told = {place: ALPHABET[t - 100] for place, t in enumerate(targets) if t != -100}
        assert told == wanted
    assert values > 0


def test_a_batch_holds_its_sequences():
    sequence, targets = task_sequence(401, "0 7", 1, TOKENS)
    tokens_BT, targets_BT = TaskStream(1, TOKENS, 401, seed=0).next(8, 0, 1)
    assert tokens_BT[7].tolist() == sequence
    assert targets_BT[7].tolist() == targets
    assert len(sequence) == 401


def test_every_question_of_a_document_is_asked_once():
    for seed in SEEDS:
        sequence, targets = task_document(150, random.Random(seed), 1, TOKENS)
        assert sequence.count(1) == 1
        text = "".join(ALPHABET[token - 100] for token in sequence[1:])
        questions = re.findall(r"\?([^?]+)", text)
        assert len(questions) == len(set(questions)) >= 2
        assert 2 <= sum(target != -100 for target in targets[1 + text.index("?") :]) <= 20


def test_the_source_brings_its_own_tokenizer(tmp_path):
    config = DataConfig(source="retrieval", sequence_length=160, isolate_documents=True)
    path = ensure_tokenizer(TokenizerConfig(vocab_size=VOCABULARY), config, tmp_path)
    data = prepare(config, path, tmp_path, is_main=True, progress=False)
    tokens_NT, targets_NT = data.validation_blocks(5)
    assert tokens_NT.shape == targets_NT.shape == (5, 160)
    assert int(tokens_NT.max()) < VOCABULARY
    assert data.bytes_per_token(targets_NT) == 1.0
    assert not torch.equal(tokens_NT, data.train.next(5, 0, 1)[0])
    with pytest.raises(ValueError, match=r"data.sequence_length=100 is too short for data.source='retrieval'"):
        prepare(replace(config, sequence_length=100), path, tmp_path, is_main=True)
    with pytest.raises(ValueError, match=r"data.isolate_documents=False: .* set it to true"):
        prepare(replace(config, isolate_documents=False), path, tmp_path, is_main=True)


def test_a_tokenizer_that_spells_a_symbol_with_two_tokens_is_refused():
    with pytest.raises(ValueError, match=rf"2 tokens for the symbol '=' .* tokenizer.vocab_size={VOCABULARY}"):
        symbol_tokens(lambda symbol: [1, 2] if symbol == "=" else [ord(symbol)])
