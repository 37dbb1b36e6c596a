"""Scenes of emoji: what is in them, what is kept back from training, questions and their answers."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from attnzoo.vision import EMOJI, Baselines, SceneOptions, SceneQuestion, SceneWorld, bitmaps, evaluation_questions
from attnzoo.vision.backgrounds import COLOURS, TEXTURES, background
from attnzoo.vision.emoji import FONTS, EmojiFont
from attnzoo.vision.questions import KINDS, MARGIN, NUMBERS, training_questions
from attnzoo.vision.scenes import Scene, SceneObject
from tests.helpers.emoji_fonts import needs

pytestmark = needs("openmoji")
OPTIONS = SceneOptions(kinds=13, held_out_font=None)


@pytest.fixture(scope="module")
def world() -> SceneWorld:
    return SceneWorld(OPTIONS)


@pytest.mark.parametrize("font", [pytest.param(font, marks=needs(font)) for font in FONTS])
def test_every_emoji_fills_its_square(font: str) -> None:
    pictures = bitmaps(font, list(EMOJI), 23)
    assert pictures.shape == (len(EMOJI), 23, 23, 4)
    opaque = pictures[..., 3] > 40
    for name, seen in zip(EMOJI, opaque, strict=True):
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) >= 20, name
    assert len({picture.tobytes() for picture in pictures}) == len(EMOJI)
    assert len(np.unique(pictures[opaque][:, :3], axis=0)) > 100  # in colour


def test_scenes_depend_on_their_index_alone(world: SceneWorld) -> None:
    other = SceneWorld(OPTIONS)
    backwards = {i: other.scene("train", 3, i) for i in reversed(range(40))}
    for i in range(40):
        scene = world.scene("train", 3, i)
        assert scene == backwards[i]
        assert world.image(scene).tobytes() == other.image(backwards[i]).tobytes()
    assert len({world.scene(split, seed, 0) for split in ("train", "standard") for seed in (0, 1)}) == 4
    assert other.digest == world.digest != SceneWorld(replace(OPTIONS, bias=0.25)).digest


def test_what_is_kept_back_is_in_no_training_scene_and_in_every_scene_of_its_split(world: SceneWorld) -> None:
    apart = set(world.held_out_pairs)
    assert len(apart) == round(0.1 * (13 * 12 / 2 - 6 - 1))  # partners are never kept apart; 12 has partner 0
    assert OPTIONS.splits == ("standard", "pairs", "positions")

    def pairs(scene: Scene) -> set[tuple[int, int]]:
        kinds = {placed.kind for placed in scene.objects}
        return {(a, b) for a in kinds for b in kinds if a < b} & apart

    def kept(scene: Scene) -> list[bool]:
        return [world.cell(placed) == world.held_out_cells[placed.kind] for placed in scene.objects]

    for split in ("train", "standard"):
        scenes = [world.scene(split, 0, i) for i in range(200)]
        assert not any(pairs(scene) or any(kept(scene)) for scene in scenes)
        assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert sum(bool(pairs(world.scene("pairs", 0, i))) for i in range(100)) >= 95  # a scene may have no room
    assert all(all(kept(world.scene("positions", 0, i))) for i in range(100))


def test_kinds_come_with_their_partners(world: SceneWorld) -> None:
    scenes = [{p.kind for p in world.scene("train", 1, i).objects} for i in range(700)]
    together = np.mean([3 in scene for scene in scenes if 2 in scene])
    alone = np.mean([3 in scene for scene in scenes if 2 not in scene])
    assert together > 2 * alone > 0
    assert sum(0 in scene for scene in scenes) > 2 * sum(12 in scene for scene in scenes)


def test_pictures_show_objects_where_they_are(world: SceneWorld) -> None:
    cut = 0
    for i in range(60):
        scene = world.scene("train", 2, i)
        image = world.image(scene).astype(int)
        assert image.shape == (64, 64, 3)
        bare = world.image(replace(scene, objects=())).astype(int)
        changed = np.abs(image - bare).max(-1) > 0
        inside = np.zeros((64, 64), bool)
        for placed in scene.objects:
            top, left = int(placed.y - placed.size / 2), int(placed.x - placed.size / 2)
            box = (slice(max(top, 0), top + placed.size), slice(max(left, 0), left + placed.size))
            cut += not (min(top, left) >= 0 and max(top, left) + placed.size <= 64)
            inside[box] = True
            assert changed[box].mean() > 0.2
        assert not changed[~inside].any()
        alone = world.image(replace(scene, objects=scene.objects[:1])).astype(
            int
        )  # what is added changes no other place
        assert (alone == image)[~inside].all()
    assert cut > 20
    for colour, base in COLOURS.items():
        for texture in TEXTURES:
            mean = background(np.random.default_rng(1), 64, colour, texture).mean((0, 1))
            assert min(COLOURS, key=lambda c: np.abs(np.array(COLOURS[c]) - mean).sum()) == colour, (base, texture)


def answered(world: SceneWorld, scene: Scene, text: str) -> str:
    """The answer, found from the words of the question."""
    names = {**{name: name for name in EMOJI}, **{emoji.plural: name for name, emoji in EMOJI.items()}}
    shown = [(world.names[p.kind], p.x, p.y) for p in scene.objects]
    if begin := re.match(r"list: (.*?)\. (.*)", text):
        words, rest = begin[1].split(", "), begin[2]
        if rest == "how many words?":
            return NUMBERS[len(words)]
        if after := re.fullmatch(r"what comes after (\w+)\?", rest):
            return words[words.index(after[1]) + 1]
        inside = re.fullmatch(r"is (\w+) in the list\?", rest)
        assert inside
        return "yes" if inside[1] in words else "no"
    if text == "what color is the background?":
        return scene.colour
    if text == "what is there, from left to right?":
        return ", ".join(name for name, x, _ in sorted(shown, key=lambda each: each[1]))
    if text == "how many objects are there?":
        return NUMBERS[len(shown)]
    if many := re.fullmatch(r"how many (\w+) are there\?", text):
        return NUMBERS[sum(name == names[many[1]] for name, _, _ in shown)]
    if there := re.fullmatch(r"is there an? (\w+)\?", text):
        return "yes" if there[1] in [name for name, _, _ in shown] else "no"
    places = {name: (x, y) for name, x, y in shown}
    if compared := re.fullmatch(r"is the (\w+) (left|above) or (?:right of|below) the (\w+)\?", text):
        axis = 0 if compared[2] == "left" else 1
        a, b = places[compared[1]][axis], places[compared[3]][axis]
        assert abs(a - b) >= MARGIN
        return (("left", "right"), ("above", "below"))[axis][a > b]
    what = re.fullmatch(r"what is (left of|right of|above|below) the (\w+)\?", text)
    assert what
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[what[1]]
    ahead = [o[0] for o in shown if sign * (o[1 + axis] - places[what[2]][axis]) > 0 and o[0] != what[2]]
    (name,) = ahead
    return name


def test_answers_are_right_and_absent_objects_are_as_hard_as_asked(world: SceneWorld) -> None:
    for kind in KINDS:
        pairs = evaluation_questions(world, "standard", kind, 50)
        assert pairs == evaluation_questions(world, "standard", kind, 50)
        for scene, question in pairs:
            assert question.answer == answered(world, scene, question.text), (question, scene)
            present = {placed.kind for placed in scene.objects}
            if question.answer == "no" and question.family == "presence":
                asked = next(k for k, name in enumerate(world.names) if re.search(rf"\b{name}\?", question.text))
                if kind == "presence_popular":
                    assert asked in [k for k in range(13) if k not in present][:3]
                if kind == "presence_adversarial":
                    assert any(world.partner[k] == asked for k in present)
        if kind.startswith("presence"):
            assert 13 <= sum(question.answer == "yes" for _, question in pairs) <= 37
    for i in range(100):
        scene = world.scene("train", 5, i)
        asked = training_questions(world, scene, 5, 0.35, (5, i))
        assert len({question.text for question in asked}) == len(asked) == 5
        assert all(question.answer == answered(world, scene, question.text) for question in asked)
        assert {question.kind for question in asked} <= KINDS.keys() - {"presence_popular", "presence_adversarial"}


def test_baselines_know_texts_and_not_pictures() -> None:
    learned = [SceneQuestion("presence_random", "a?", answer) for answer in ("no", "no", "yes")]
    learned += [SceneQuestion("presence_random", "b?", "yes")] * 4 + [SceneQuestion("count", "c?", "two")]
    baselines = Baselines(learned)
    for kind, text, majority, blind in (
        ("presence_adversarial", "a?", "yes", "no"),
        ("presence_popular", "new?", "yes", "yes"),
        ("count", "c?", "two", "two"),
        ("side", "d?", "", ""),
    ):
        question = SceneQuestion(kind, text, "")
        assert (baselines.majority(question), baselines.blind(question)) == (majority, blind)


def test_what_makes_no_scene_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for values, message in (
        ({"kinds": 3}, "kinds=3 must be from 4 to 32"),
        ({"most_objects": 5}, "most_objects=5 must be from 1 to 4"),
        ({"smallest": 20, "largest": 18}, "smallest=20, largest=18: give sizes from 4 pixels on, in order"),
        ({"image_size": 32}, "largest=22 must be at most half of image_size=32"),
        ({"bias": 1.0}, "bias=1.0 must be at least 0 and below 1"),
        ({"world": -1}, "world=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SceneOptions(**values)
    lost = EmojiFont(lambda: None, "apt-get install fonts-lost", "a licence")
    monkeypatch.setitem(FONTS, "lost", lost)
    (tmp_path / "torn.ttf").write_bytes(b"no font")
    for font, message in (
        ("lost", r"font='lost' is not installed: apt-get install fonts-lost \(licence: a licence\)"),
        ("openmojy", "font='openmojy' is unknown; did you mean 'openmoji'"),
        ("nowhere.ttf", "font='nowhere.ttf' is no file"),
        (str(tmp_path / "torn.ttf"), "torn.ttf cannot be read as a font"),
    ):
        with pytest.raises(ValueError, match=message):
            bitmaps(font, ["apple"], 9)
    with pytest.raises(
        ValueError, match=r"held_out_font='lost' is not installed: .*; or go without: held_out_font=null"
    ):
        SceneWorld(replace(OPTIONS, held_out_font="lost"))
    with pytest.raises(ValueError, match="unknown emoji 'aple'; did you mean 'apple'"):
        bitmaps("openmoji", ["aple"], 9)


@needs("noto")
def test_the_held_out_font_shows_the_same_scenes_in_other_emoji() -> None:
    options = SceneOptions()
    world = SceneWorld(options)
    assert options.splits == ("standard", "pairs", "positions", "font")
    scene = world.scene("font", 0, 0)
    assert scene.font == "noto"
    assert {world.scene("train", 0, i).font for i in range(20)} == {"openmoji"}
    other = replace(scene, font="openmoji", objects=(SceneObject(0, 30, 30, 20),))
    assert (world.image(other) != world.image(replace(other, font="noto"))).any()
    assert Counter(world.scene("font", 0, i).colour for i in range(99)).keys() == COLOURS.keys()
