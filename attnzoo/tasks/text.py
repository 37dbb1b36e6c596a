"""The retrieval tasks of `symbols` in English, for checkpoints that were trained on text.

A context is plain sentences with the items to find between them. Each sentence is encoded alone, so that the token
positions of every answer are known. One sentence is cut so that the context has exactly the requested number of tokens.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnzoo.tasks.examples import Example, Ids, Question

Encode = Callable[[str], Sequence[int]]
"""A tokenizer's `encode`, without begin and end tokens."""

SENTENCES = (
    " The baker opens the shop before the street lamps go out.",
    " A narrow path leads from the orchard down to the lake.",
    " Rain fell for most of the morning and stopped at noon.",
    " The old clock in the hall is a little slow in winter.",
    " Two boats were tied to the pier with a blue rope.",
    " She put the kettle on and looked out of the window.",
    " The library keeps its maps in a cool room downstairs.",
    " Children were playing with a red ball near the fountain.",
    " The train to the coast leaves from the second platform.",
    " He repaired the fence and painted the gate the same day.",
    " In spring the fields behind the farm are full of poppies.",
    " The teacher wrote a short poem on the board.",
    " A cat slept on the warm stones beside the wall.",
    " They carried the table through the garden to the barn.",
    " The market was quiet because of the holiday.",
    " Someone had left an umbrella under the bench.",
)
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Rome", "Quito", "Seoul", "Paris", "Tokyo", "Berlin", "Dublin")
NOUNS = ("apple", "river", "candle", "tiger", "pencil", "garden", "silver", "window", "bread", "mirror", "forest",
         "island", "lemon", "pepper", "rocket", "saddle", "tunnel", "velvet", "wagon", "zebra")  # fmt: skip
NAMES = ("alpha", "beta", "gamma", "delta", "sigma", "omega", "kappa", "theta", "zeta")

NEEDLES, PAIRS, CHAINS, HOPS = 3, 6, 3, 2


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A question as text. items: indices of the items that the answer depends on."""

    prompt: str
    lead: str
    answer: str
    items: tuple[int, ...]


def _number(digits: int, rng: random.Random) -> str:
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def passkey(rng: random.Random) -> tuple[list[str], list[Ask]]:
    """A pass key and a door code of five digits."""
    names = rng.sample(["pass key", "door code"], 2)
    numbers = [_number(5, rng) for _ in names]
    items = [f" The {name} is {number}. Remember it." for name, number in zip(names, numbers, strict=True)]
    asks = [
        Ask(prompt=f" What is the {name}?", lead=f" The {name} is", answer=f" {number}", items=(place,))
        for place, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    return items, asks


def needles(rng: random.Random) -> tuple[list[str], list[Ask]]:
    """Magic numbers of several cities."""
    cities = rng.sample(CITIES, NEEDLES)
    numbers = [_number(3, rng) for _ in cities]
    items = [f" The magic number of {c} is {n}." for c, n in zip(cities, numbers, strict=True)]
    asks = [
        Ask(
            prompt=f" What is the magic number of {city}?",
            lead=f" The magic number of {city} is",
            answer=f" {number}",
            items=(place,),
        )
        for place, (city, number) in enumerate(zip(cities, numbers, strict=True))
    ]
    return items, asks


def recall(rng: random.Random) -> tuple[list[str], list[Ask]]:
    """Many pairs of a word and a number."""
    nouns = rng.sample(NOUNS, PAIRS)
    numbers = [_number(2, rng) for _ in nouns]
    items = [f"\n{noun}: {number}\n" for noun, number in zip(nouns, numbers, strict=True)]
    asks = [
        Ask(prompt=f"\nLook up {noun}.", lead=f"\n{noun}:", answer=f" {number}", items=(place,))
        for place, (noun, number) in enumerate(zip(nouns, numbers, strict=True))
    ]
    return items, asks


def variables(rng: random.Random) -> tuple[list[str], list[Ask]]:
    """Chains of variables; the question asks for the value of the last one."""
    names = rng.sample(NAMES, CHAINS * (HOPS + 1))
    items: list[str] = []
    asks = []
    for chain in range(CHAINS):
        own, value = names[chain::CHAINS], _number(4, rng)
        first = len(items)
        items.append(f" Let {own[0]} be {value}.")
        items += [f" Let {own[step]} be equal to {own[step - 1]}." for step in range(1, HOPS + 1)]
        ask = Ask(
            prompt=f" What is the value of {own[HOPS]}?",
            lead=f" The value of {own[HOPS]} is",
            answer=f" {value}",
            items=tuple(range(first, len(items))),
        )
        asks.append(ask)
    return items, asks


def words(rng: random.Random) -> tuple[list[str], list[Ask]]:
    """Word lists of two kinds, each with one word far more often than the others."""
    items: list[str] = []
    asks = []
    for kind, pool in (("city", CITIES), ("thing", NOUNS)):
        common = rng.choice(pool)
        others = rng.sample([word for word in pool if word != common], 5)
        places = []
        for word in rng.sample([common] * 7 + others, 12):
            if word == common:
                places.append(len(items))
            items.append(f" Next {kind}: {word}.")
        ask = Ask(
            prompt=f" Which {kind} was named most often?",
            lead=f" The {kind} that was named most often is",
            answer=f" {common}",
            items=tuple(places),
        )
        asks.append(ask)
    return items, asks


TEXT_TASKS: dict[str, Callable[[random.Random], tuple[list[str], list[Ask]]]] = {
    "passkey": passkey,
    "needles": needles,
    "recall": recall,
    "variables": variables,
    "words": words,
}


def text_example(encode: Encode, task: str, length: int, seed: int) -> Example:
    """An example of a task with a context of `length` tokens; its questions are in random order.

    Raises ValueError for an unknown task, and for a context too short for the task's items.
    """
    if task not in TEXT_TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TEXT_TASKS)}")
    rng = random.Random(f"{task} {length} {seed}")
    items, asks = TEXT_TASKS[task](rng)
    body, spans = _fill(encode, items, length, rng)
    questions = []
    for ask in rng.sample(asks, len(asks)):
        places = tuple(place for item in ask.items for place in range(*spans[item]))
        parts = {name: tuple(encode(getattr(ask, name))) for name in ("prompt", "lead", "answer")}
        questions.append(Question(**parts, places=places))
    return Example(task=task, body=body, questions=tuple(questions))


def _fill(encode: Encode, items: list[str], length: int, rng: random.Random) -> tuple[Ids, list[tuple[int, int]]]:
    """(context, (start, end) of every item): items in order between random sentences, `length` tokens in all."""
    pieces = [tuple(encode(item)) for item in items]
    room = length - sum(map(len, pieces))
    if room < 0:
        raise ValueError(f"length={length} is too short for the {length - room} tokens to find; give a larger length")
    sentences: list[Ids] = []
    while sum(map(len, sentences)) < room:
        sentences.append(tuple(encode(rng.choice(SENTENCES))))
    gaps = sorted(rng.randint(0, len(sentences)) for _ in items)
    surplus = sum(map(len, sentences)) - room
    if surplus:
        # Only a part of the last sentence fits: its end begins the context.
        sentences.insert(0, sentences.pop()[surplus:])
    body: list[int] = []
    spans = []
    for place in range(len(sentences) + 1):
        for gap, piece in zip(gaps, pieces, strict=True):
            if gap == place:
                spans.append((len(body), len(body) + len(piece)))
                body += piece
        body += sentences[place] if place < len(sentences) else ()
    return tuple(body), spans
