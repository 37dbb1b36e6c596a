"""Questions about scenes, with their answers, and what can be answered without looking.

Presence is asked as in POPE (Li et al. 2023, arXiv 2305.10355): half of the questions are about objects that are there;
the others about a random absent kind, the most popular absent one, or (adversarial) one that tends to be together with
what is there. A model that expects more than it sees fails at the last.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from attnzoo.vision.emoji import EMOJI, with_article
from attnzoo.vision.scenes import Scene, SceneObject, SceneWorld, Split

MARGIN = 6.0
"""Pixels by which the middles of two objects must differ before one is left of, or above, the other."""
POPULAR = 3
"""How many of the most popular absent kinds are asked for."""
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class SceneQuestion:
    """kind: one of KINDS."""

    kind: str
    text: str
    answer: str

    @property
    def family(self) -> str:
        """The kind without how absent objects were chosen: what shares its answers."""
        return self.kind.partition("_")[0]


Ask = Callable[[SceneWorld, Scene, np.random.Generator], SceneQuestion | None]
"""A question about a scene; None where the scene has nothing to ask for."""


def _one(random: np.random.Generator, items: Sequence[int]) -> int:
    return int(items[int(random.integers(len(items)))])


def _presence(negatives: str) -> Ask:
    def ask(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
        present = sorted({placed.kind for placed in scene.objects})
        absent = [kind for kind in range(world.options.kinds) if kind not in present]
        if negatives == "popular":
            absent = absent[:POPULAR]  # kinds are in the order of their popularity
        elif negatives == "adversarial":
            absent = [int(world.partner[kind]) for kind in present if world.partner[kind] not in present]
        if not absent or not present:
            return None
        there = bool(random.random() < 0.5)
        kind = _one(random, present if there else absent)
        text = f"is there {with_article(world.names[kind])}?"
        return SceneQuestion(f"presence_{negatives}", text, "yes" if there else "no")

    return ask


def _count(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
    chance, present = random.random(), [placed.kind for placed in scene.objects]
    if chance < 0.4:
        return SceneQuestion("count", "how many objects are there?", NUMBERS[len(scene.objects)])
    kind = _one(random, present) if chance < 0.7 and present else int(random.integers(world.options.kinds))
    return SceneQuestion("count", f"how many {EMOJI[world.names[kind]].plural} are there?", NUMBERS[scene.count(kind)])


def _compared(kind: str, axis: str, words: tuple[str, str], asked: str) -> Ask:
    def ask(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
        single = scene.single
        pairs = [
            (a, b) for a in single for b in single if a is not b and abs(getattr(a, axis) - getattr(b, axis)) >= MARGIN
        ]
        if not pairs:
            return None
        a, b = pairs[int(random.integers(len(pairs)))]
        text = f"is the {world.names[a.kind]} {asked} the {world.names[b.kind]}?"
        return SceneQuestion(kind, text, words[getattr(a, axis) > getattr(b, axis)])

    return ask


DIRECTIONS = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}


def _relation(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
    """What stands on one side of an object, where that is one object and no other nearly does."""
    found: list[tuple[SceneObject, str, SceneObject]] = []
    for a in scene.single:
        for word, (axis, sign) in DIRECTIONS.items():
            ahead = [(sign * (getattr(b, axis) - getattr(a, axis)), b) for b in scene.objects if b is not a]
            ahead = [(distance, b) for distance, b in ahead if distance > -MARGIN]
            if len(ahead) == 1 and ahead[0][0] >= MARGIN:
                found.append((a, word, ahead[0][1]))
    if not found:
        return None
    a, word, b = found[int(random.integers(len(found)))]
    return SceneQuestion("relation", f"what is {word} the {world.names[a.kind]}?", world.names[b.kind])


def _colour(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
    return SceneQuestion("colour", "what color is the background?", scene.colour)


def _names(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
    """Everything that is there: the one question whose answer says what each object is."""
    if not scene.objects:
        return None
    placed = sorted(scene.objects, key=lambda each: each.x)
    return SceneQuestion(
        "names", "what is there, from left to right?", ", ".join(world.names[each.kind] for each in placed)
    )


def _text(world: SceneWorld, scene: Scene, random: np.random.Generator) -> SceneQuestion | None:
    """A question about a list of words, for which the picture is of no use."""
    order = random.permutation(world.options.kinds)
    words = [world.names[kind] for kind in order[: int(random.integers(2, 5))]]
    begin, chance = f"list: {', '.join(words)}.", random.random()
    if chance < 0.4:
        there = bool(random.random() < 0.5)
        word = words[int(random.integers(len(words)))] if there else world.names[order[4 % len(order)]]
        if not there and word in words:  # a world of four kinds may have no other word
            there = True
        return SceneQuestion("text", f"{begin} is {word} in the list?", "yes" if there else "no")
    if chance < 0.6:
        return SceneQuestion("text", f"{begin} how many words?", NUMBERS[len(words)])
    place = int(random.integers(len(words) - 1))
    return SceneQuestion("text", f"{begin} what comes after {words[place]}?", words[place + 1])


KINDS: dict[str, Ask] = {
    "presence_random": _presence("random"),
    "presence_popular": _presence("popular"),
    "presence_adversarial": _presence("adversarial"),
    "count": _count,
    "side": _compared("side", "x", ("left", "right"), "left or right of"),
    "height": _compared("height", "y", ("above", "below"), "above or below"),
    "relation": _relation,
    "colour": _colour,
    "names": _names,
    "text": _text,
}
"""How each kind of question is asked."""
LEARNED = {
    "names": 0.2,
    "presence_random": 0.14,
    "count": 0.15,
    "side": 0.17,
    "height": 0.13,
    "relation": 0.15,
    "colour": 0.06,
}
"""Shares of the kinds in training, where absent objects are random ones. One answer in five names all objects: yes and
no alone say little of what an object looks like. What is learned last, sides, is asked more than what is learned first,
presence."""


def training_questions(
    world: SceneWorld, scene: Scene, turns: int, text_share: float, key: tuple[int, ...]
) -> list[SceneQuestion]:
    """`turns` questions about a scene, each of them with probability `text_share` about words alone; no question is
    asked twice. key: seeds the choice."""
    random = np.random.default_rng(key)
    cumulative, kinds = np.cumsum(list(LEARNED.values())), list(LEARNED)
    asked: dict[str, SceneQuestion] = {}
    for _ in range(20 * turns):
        if len(asked) == turns:
            break
        kind = (
            "text" if random.random() < text_share else kinds[int(np.searchsorted(cumulative, random.random() * 0.999))]
        )
        question = KINDS[kind](world, scene, random)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def evaluation_questions(
    world: SceneWorld, split: Split, kind: str, count: int, seed: int = 0
) -> list[tuple[Scene, SceneQuestion]]:
    """`count` questions of a kind, each about a scene of its own."""
    found: list[tuple[Scene, SceneQuestion]] = []
    index = list(KINDS).index(kind) << 32
    while len(found) < count:
        scene = world.scene(split, seed, index)
        question = KINDS[kind](world, scene, np.random.default_rng((*scene.seed, 2)))
        index += 1
        if question is not None and scene.objects:
            found.append((scene, question))
    return found


class Baselines:
    """What questions of training say about answers: the most frequent answer of a family (majority), and of the same
    text (blind), which is all that can be known without the picture."""

    def __init__(self, learned: Iterable[SceneQuestion]) -> None:
        families: dict[str, Counter[str]] = {}
        texts: dict[str, Counter[str]] = {}
        for question in learned:
            families.setdefault(question.family, Counter())[question.answer] += 1
            texts.setdefault(question.text, Counter())[question.answer] += 1
        self._majority = {family: counts.most_common(1)[0][0] for family, counts in families.items()}
        self._blind = {text: counts.most_common(1)[0][0] for text, counts in texts.items()}

    def majority(self, question: SceneQuestion) -> str:
        """The most frequent answer to questions of its family."""
        return self._majority.get(question.family, "")

    def blind(self, question: SceneQuestion) -> str:
        """The most frequent answer to this text, for a text that was never asked that of its family."""
        return self._blind.get(question.text, self.majority(question))
