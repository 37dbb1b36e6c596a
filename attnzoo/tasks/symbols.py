"""Retrieval tasks over an alphabet of single symbols, for a small model that is trained on them.

A seed determines each example. A context is filler with items at random places. A question is `?` and a sign, its
lead is the sign again, and the answer is what follows the sign in the context. In the list, three quoted strings after
"asks" are question, lead and answer:

- passkey: `#ABCD` and `%EFGH`, each hidden once; asks `?#` `#` `ABCD` (after Mohtashami & Jaggi 2023,
  arXiv 2305.16300).
- needles: several `!kAB`; asks `?!k` `!k` `AB` (multi-key needle of RULER, Hsieh et al. 2024, arXiv 2404.06654).
- recall: many pairs `kA` (MQAR, Arora et al. 2023, arXiv 2312.04927); asks `?k` `k` `A`.
- variables: `=aV` gives a the value V, `=ba` gives b the value of a, in chains; asks `?=b` `=b` `V` (RULER's variable
  tracking, but for the value of one variable instead of all names).
- words: lower and upper case symbols, one of each far more frequent than the others; asks `?*` `*` `a` and `?+` `+` `A`
  (RULER's common-word extraction, one word a question).
"""

import random
import string
from collections.abc import Callable, Sequence

from attnzoo.tasks.examples import Example, Question

KEYS, VALUES, FILLER, MARKS = string.ascii_lowercase, string.ascii_uppercase, string.digits, "?#%!=*+"
ALPHABET = KEYS + VALUES + FILLER + MARKS
"""A symbol's number is its index in this string."""
INDEX = {symbol: index for index, symbol in enumerate(ALPHABET)}

VOCABULARY = 262 + len(ALPHABET)
"""Vocabulary size of a tokenizer for these symbols: the symbols, space, newline, 256 bytes and 4 control tokens."""

NEEDLES, PAIRS, CHAINS, HOPS = 6, 20, 4, 2


def encode(text: str) -> tuple[int, ...]:
    """Symbol numbers of a text over `ALPHABET`."""
    return tuple(INDEX[symbol] for symbol in text)


def decode(symbols: tuple[int, ...]) -> str:
    """The text of symbol numbers."""
    return "".join(ALPHABET[symbol] for symbol in symbols)


def scatter(items: list[str], length: int, rng: random.Random) -> tuple[str, list[int]]:
    """(context of `length` symbols, start of every item): the items in order at random places in filler."""
    room = length - sum(map(len, items))
    if room < 0:
        raise ValueError(f"length={length} is too short for the {length - room} symbols to find; give a larger length")
    gaps = sorted(rng.randint(0, room) for _ in items)
    text, starts, used = "", [], 0
    for item, gap in zip(items, gaps, strict=True):
        text += "".join(rng.choices(FILLER, k=gap - used))
        starts.append(len(text))
        text, used = text + item, gap
    return text + "".join(rng.choices(FILLER, k=room - used)), starts


def _question(sign: str, answer: str, *spans: tuple[int, int]) -> Question:
    """A question. spans: (start, length) of the parts of the context that the answer depends on."""
    places = tuple(place for start, length in spans for place in range(start, start + length))
    return Question(prompt=encode("?" + sign), lead=encode(sign), answer=encode(answer), places=places)


def passkey(length: int, rng: random.Random) -> tuple[str, list[Question]]:
    """Two keys of four symbols, each hidden once."""
    values = rng.sample(VALUES, 8)
    items = [mark + "".join(values[i::2]) for i, mark in enumerate(rng.sample("#%", 2))]
    text, starts = scatter(items, length, rng)
    return text, [_question(item[0], item[1:], (start, 5)) for item, start in zip(items, starts, strict=True)]


def needles(length: int, rng: random.Random) -> tuple[str, list[Question]]:
    """Several needles, each with its own key."""
    values = rng.sample(VALUES, 2 * NEEDLES)
    items = [f"!{key}{''.join(values[i::NEEDLES])}" for i, key in enumerate(rng.sample(KEYS, NEEDLES))]
    text, starts = scatter(items, length, rng)
    return text, [_question(item[:2], item[2:], (start, 4)) for item, start in zip(items, starts, strict=True)]


def recall(length: int, rng: random.Random) -> tuple[str, list[Question]]:
    """Many pairs of key and value."""
    items = [key + rng.choice(VALUES) for key in rng.sample(KEYS, PAIRS)]
    text, starts = scatter(items, length, rng)
    return text, [_question(item[0], item[1], (start, 2)) for item, start in zip(items, starts, strict=True)]


def variables(length: int, rng: random.Random) -> tuple[str, list[Question]]:
    """Chains of variables; the assignments are interleaved, and each variable is defined before it is read."""
    names = rng.sample(KEYS, CHAINS * (HOPS + 1))
    chains = [names[i::CHAINS] for i in range(CHAINS)]
    values = [rng.choice(VALUES) for _ in chains]
    turns = [chain for chain in range(CHAINS) for _ in range(HOPS + 1)]
    rng.shuffle(turns)
    done = [0] * CHAINS
    items = []
    for chain in turns:
        step, own = done[chain], chains[chain]
        items.append(f"={own[step]}{own[step - 1] if step else values[chain]}")
        done[chain] += 1
    text, starts = scatter(items, length, rng)
    found = dict(zip(items, starts, strict=True))
    questions = []
    for own, value in zip(chains, values, strict=True):
        spans: list[tuple[int, int]] = []
        for step in range(HOPS + 1):
            spans.append((found[f"={own[step]}{own[step - 1] if step else value}"], 3))
            questions.append(_question(f"={own[step]}", value, *spans))
    return text, questions


def words(length: int, rng: random.Random) -> tuple[str, list[Question]]:
    """Symbols without filler: one lower and one upper case symbol make up a sixth of the context each."""
    common = [rng.choice(KEYS), rng.choice(VALUES)]
    often = length // 6
    others = [symbol for symbol in KEYS + VALUES if symbol not in common]
    rest = length - 2 * often
    drawn = others * (rest // len(others) + 1)
    rng.shuffle(drawn)
    symbols = common * often + drawn[:rest]
    rng.shuffle(symbols)
    text = "".join(symbols)
    questions = []
    for mark, symbol in zip("*+", common, strict=True):
        places = [(place, 1) for place, other in enumerate(text) if other == symbol]
        questions.append(_question(mark, symbol, *places))
    return text, questions


SYMBOL_TASKS: dict[str, Callable[[int, random.Random], tuple[str, list[Question]]]] = {
    "passkey": passkey,
    "needles": needles,
    "recall": recall,
    "variables": variables,
    "words": words,
}


def symbol_tokens(encode: Callable[[str], Sequence[int]]) -> list[int]:
    """The token id of every symbol of `ALPHABET`. Raises ValueError if a symbol is not one token."""
    tokens = [encode(symbol) for symbol in ALPHABET]
    for symbol, found in zip(ALPHABET, tokens, strict=True):
        if len(found) != 1:
            raise ValueError(
                f"the tokenizer needs {len(found)} tokens for the symbol {symbol!r} of the retrieval tasks; train one "
                f"with data.source=retrieval and tokenizer.vocab_size={VOCABULARY}"
            )
    return [found[0] for found in tokens]


def symbol_example(task: str, length: int, seed: int | str) -> Example:
    """An example of a task with a context of `length` symbols; its questions are in random order.

    Raises ValueError for an unknown task, and for a context too short for the task's items.
    """
    if task not in SYMBOL_TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(SYMBOL_TASKS)}")
    rng = random.Random(f"{task} {length} {seed}")
    text, questions = SYMBOL_TASKS[task](length, rng)
    rng.shuffle(questions)
    return Example(task=task, body=encode(text), questions=tuple(questions))
