"""Experiment P's parts: squares, metrics on pictures that are known to be good or bad, readers, arms, what is kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnzoo.clinical.metrics import auroc
from attnzoo.models import DiffusionConfig, DiffusionUNet
from attnzoo.vision import STYLES, CaptionWords
from attnzoo.vision.captions import words_of
from attnzoo.vision.trained_diffusion import TrainedDiffusion
from tests.helpers.emoji_fonts import needs
from train.data.captioned import SCENES
from train.experiments.composition import metrics
from train.experiments.composition.arms import (
    ARMS,
    COMPOSED,
    FULL,
    PASTE,
    SDEDIT,
    model_calls,
    options_of,
    run_arms,
    sdedit,
)
from train.experiments.composition.cases import make_cases, world_of
from train.experiments.composition.crops import cut
from train.experiments.composition.gate import prompts
from train.experiments.composition.kept import kept
from train.experiments.composition.reader import (
    PictureReading,
    Reader,
    drawn,
    object_square,
    train_reader,
    whole_picture,
)
from train.experiments.composition.realism import classifier_two_sample, kernel_distance
from train.experiments.composition.scores import Readers, Wanted, scores
from train.experiments.composition.validity import PAIRS, UNORDERED, known_pictures, pair_table

DATA = {**SCENES, "kinds": 4, "styles": list(STYLES)}
pytestmark = needs("openmoji")


@pytest.fixture(scope="module")
def cases():
    return make_cases(world_of(DATA), DATA["styles"], 0, 24)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    words = CaptionWords()
    sizes = {"vocab_size": len(words), "widths": (8,), "patch": 4, "num_heads": 2, "text_dim": 8, "text_layers": 1}
    return TrainedDiffusion(DiffusionUNet(DiffusionConfig(**sizes)).eval(), words, DATA)


def test_cases_have_a_right_answer_and_a_wrong_one(cases):
    assert [case.style for case in cases[:5]] == [*STYLES, "photo"]
    for case in cases:
        placement, box = case.placement, case.box()
        assert np.array_equal(case.moved(), case.answer)
        assert len({case.kind, case.other, case.strange}) == 3
        far = ~metrics.ring(box[None], metrics.SPREAD)[0] & ~box
        assert np.array_equal(case.answer[far], placement.background[far])
        assert np.array_equal(case.wrong[far], placement.background[far])
        assert not np.array_equal(case.wrong, case.answer)
        start, stop = words_of(placement.caption, placement.words)
        assert stop - start == 2
        assert placement.background_caption.split()[3] in placement.caption
        if case.style == "photo":
            assert np.array_equal(placement.pasted(), case.answer)
    again = make_cases(world_of(DATA), DATA["styles"], 0, 3)
    assert all(np.array_equal(one.answer, other.answer) for one, other in zip(again, cases, strict=False))
    other = make_cases(world_of(DATA), DATA["styles"], 1, 3)
    assert not np.array_equal(other[0].answer, cases[0].answer)
    with pytest.raises(ValueError, match="most_objects=1"):
        world_of({**DATA, "most_objects": 1})


def test_squares_are_cut_by_hand():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 10, 10, 3), dtype=np.uint8)
    squares = np.array([[0, 0, 10], [2, 3, 5], [-2, 7, 5]])
    found = cut(images, squares, side=5)
    assert np.array_equal(found[1], images[1, 3:8, 2:7])
    assert np.array_equal(found[2], images[2][[7, 8, 9, 9, 9]][:, [0, 0, 0, 1, 2]])
    halves = images[0].astype(float).reshape(5, 2, 5, 2, 3).mean((1, 3))
    assert np.abs(found[0] - halves).max() <= 0.5


def test_metrics_by_hand():
    answers = np.full((2, 8, 8, 3), 100, np.uint8)
    answers[:, 3:5, 3:5] = 200
    region = np.zeros((2, 8, 8), bool)
    region[:, 3:5, 3:5] = True
    assert not metrics.background_error(answers, answers, region).any()
    brighter, corner = answers.copy(), np.zeros((2, 8, 8), bool)
    corner[:, 0, 0], brighter[0, 2, 2] = True, 0  # 4 steps away
    brighter[1] = np.minimum(answers[1] + 51, 255)
    assert metrics.background_error(brighter, answers, corner) == pytest.approx([0, 51 / 255])
    assert metrics.palette_distance(answers, answers, region).tolist() == [0, 0]
    swapped = np.where(region[..., None], answers[:, :, ::-1], answers)  # the same colours elsewhere
    assert metrics.palette_distance(swapped, answers, region).tolist() == [0, 0]
    ring = metrics.ring(region, 1)[0]
    assert ring.sum() == 12  # 4 inside, 8 beside
    assert [bool(ring[at]) for at in ((2, 3), (2, 2), (1, 3))] == [True, False, False]
    double = answers.copy()
    double[:, 3:5, 3:5] = 255
    expected = 2 * np.log(155 / 100)
    assert metrics.seam(double, answers, region) == pytest.approx([expected] * 2, rel=0.01)
    assert metrics.seam(answers, double, region) == pytest.approx([expected] * 2, rel=0.01)
    told = PictureReading(
        np.log([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), np.array([[0.9, 0.1], [0.4, 0.6]]), np.zeros((2, 1))
    )
    assert metrics.rank(told, [0, 0]).tolist() == [3, 1]
    assert metrics.style_fit(told, [0, 1]).tolist() == [0.9, 0.6]
    assert metrics.leakage(told, [1, 2]) == pytest.approx([0.7, 0.2])
    assert np.array_equal(metrics.without_object(double, answers, region), answers)


def test_sets_are_told_apart():
    random = np.random.default_rng(0)
    one, other, far = random.normal(size=(3, 160, 12))
    far += 0.8
    assert abs(classifier_two_sample(one, other) - 0.5) < 0.1
    assert classifier_two_sample(one, far) > 0.9
    near, spread = kernel_distance(one, other)
    assert abs(near) < spread
    assert kernel_distance(one, far)[0] > 10 * abs(near)


def test_metrics_order_known_pictures(cases):
    """Those that need no reader, and distances of the features of one that has learned nothing."""
    torch.manual_seed(0)
    readers = Readers(Reader(4, 4).eval(), Reader(4, 4).eval(), tuple(STYLES))
    known = known_pictures(cases, 0)
    found = {name: scores(readers, cases, images) for name, images in known.items()}
    answer = scores(readers, cases, Wanted.of(cases, readers.styles).answers)
    assert not any(answer[name].any() for name in ("background error", "object distance", "seam", "palette distance"))
    bad = np.repeat([0, 1], len(cases))
    for metric, better, worse in PAIRS:
        if metric in ("background error", "seam", "palette distance"):
            values = np.concatenate([found[better][metric], found[worse][metric]])
            assert auroc(bad, values) >= 0.95, (metric, better, worse)
    assert auroc(bad, np.concatenate([found[n]["object distance"] for n in ("noisy", "wrong object")])) >= 0.95
    assert [(row["metric"], row["better"], row["worse"]) for row in pair_table(readers, cases[:4], 0)] == [
        *PAIRS,
        *UNORDERED,
    ]


@pytest.mark.parametrize("draw", [whole_picture, object_square])
def test_pictures_that_readers_learn_from(draw, monkeypatch):
    monkeypatch.setattr("train.experiments.composition.reader.BATCH", 4)
    world = world_of(DATA)
    found, again = (drawn(draw, world, DATA["styles"], (0, 1), 12) for _ in range(2))
    assert np.array_equal(found.images, again.images)
    assert found.there_NK.any(1).all()
    side = 32 if draw is whole_picture else 24
    assert found.images.shape == (12, side, side, 3)
    count = 0

    def tick():
        nonlocal count
        count += 1

    one, other = (train_reader(draw, world, DATA["styles"], seed=3, steps=1, tick=tick) for _ in range(2))
    assert count == 2
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def test_arms_differ_in_what_they_say(trained, cases):
    sketches = [case for case in cases if case.style == "sketch"][:2]
    calls = 0

    def tick():
        nonlocal calls
        calls += 1

    found, cost = run_arms(trained, sketches, [5, 6], 3, tick)
    assert calls == model_calls("sketch", 3)
    assert list(found) == list(ARMS)
    assert np.array_equal(found[PASTE][1], sketches[1].placement.pasted())
    assert cost.forwards[PASTE] == 0
    # 2 rows a step, 4 more in the 2 steps of infusion, and both inversions
    assert cost.forwards[FULL] == 2 * (3 * 2 + 2 * 4 + 3 * 2)
    options = {arm: options_of("sketch", arm, 3) for arm in COMPOSED}
    assert {arm: (of.infused, of.confined) for arm, of in options.items()} == {
        "inversion + paste": (0.0, False), "without infusion": (0.0, True),
        "without region constraint": (0.6, False), "PrimeComposer": (0.6, True),
    }  # fmt: skip
    assert len({replace(of, infused=0.0, confined=True) for of in options.values()}) == 1
    other = sdedit(trained, [case.placement for case in sketches], [5, 7], 3, 2.5)
    assert np.array_equal(other[0], found[SDEDIT][0])
    assert not np.array_equal(other[1], found[SDEDIT][1])


def test_prompts_name_every_kind_in_every_style():
    names = world_of(DATA).names
    found = prompts(names, list(STYLES), 0, 2)
    assert len(found) == 2 * 4 * len(names) == len({prompt.seed for prompt in found})
    for prompt in found:
        assert list(STYLES)[prompt.style] in prompt.caption
        assert names[prompt.kind] in prompt.caption
        CaptionWords().encode(prompt.caption, 16)


def test_results_are_kept(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": np.arange(3)}

    first, old = kept(tmp_path, "seed 0, photo, 1", {"seed": 0}, make)
    again, older = kept(tmp_path, "seed 0, photo, 1", {"seed": 0}, make)
    assert (old, older, len(made)) == (False, True, 1)
    assert np.array_equal(first["x"], again["x"])
    kept(tmp_path, "seed 0, photo, 1", {"seed": 1}, make)
    assert len(made) == 2
    path = min(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:40])
    other = max(tmp_path.iterdir())
    other.write_bytes(b"")
    for seed in (0, 1):
        with pytest.raises(ValueError, match=r"cannot be read .*; remove it to compute it again"):
            kept(tmp_path, "seed 0, photo, 1", {"seed": seed}, make)
