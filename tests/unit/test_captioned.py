"""Captioned pictures: styles, captions and their words, rows by their number; and the task that is trained on them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attnzoo.diffusion import noised
from attnzoo.models import DiffusionUNet
from attnzoo.vision import EMOJI, STYLES, CaptionWords, SceneOptions, SceneWorld, caption, load_diffusion
from attnzoo.vision.captions import longest_caption, words_of
from attnzoo.vision.trained_diffusion import TrainedDiffusion, from_pixels, save_diffusion, to_pixels
from tests.helpers.emoji_fonts import needs
from tests.helpers.training import last_of
from train.config_reader import load_config
from train.data.captioned import SCENES, CaptionedOptions, CaptionedScenes, CaptionedStream
from train.tasks import build_task

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "model={widths: [8], patch: 4, num_heads: 2, text_dim: 8, text_layers: 1}",
    "data.kinds=4",
    "data.images=64",
    "data.validation_images=9",
)
pytestmark = needs("openmoji")


@pytest.fixture(scope="module")
def world():
    return SceneWorld(SceneOptions(**SCENES))


def tiny_task(*overrides):
    return build_task(load_config(ROOT / "configs" / "diffusion-emoji.yaml", last_of([*TINY, *overrides])))


def test_every_style_is_a_function_of_each_picture(world):
    images = np.stack([world.image(world.scene("train", 0, index)) for index in range(6)])
    for name, style in STYLES.items():
        found = style(images)
        assert found.dtype == np.uint8
        assert found.shape == images.shape
        assert np.array_equal(found[2], style(images[2])), "a picture's style depends on no other picture"
        assert np.array_equal(found, images) == (name == "photo")
    assert (STYLES["sketch"](images)[..., 0] == STYLES["sketch"](images)[..., 2]).all()
    assert len(np.unique(STYLES["cartoon"](images))) <= 4
    assert len(np.unique(STYLES["painting"](images).reshape(-1, 3), axis=0)) <= 12


def test_captions_say_what_is_there():
    world = SceneWorld(SceneOptions(**{**SCENES, "kinds": 5}))
    words, seen = CaptionWords.of(world.names, ("sketch",), 2), set()
    for index in range(400):
        scene = world.scene("train", 0, index)
        text = caption(scene, "sketch", world.names)
        seen |= set(text.split())
        ids = words.encode(text, longest_caption(2))
        assert [words.words[i] for i in ids if i >= 0] == text.split()
        for kind in {placed.kind for placed in scene.objects}:
            name = world.names[kind]
            assert (EMOJI[name].plural if scene.count(kind) > 1 else name) in text.split()
        assert text.startswith("a sketch of ")
        assert text.endswith(f" on a {scene.colour} {scene.texture} background")
    assert seen == set(words.words), "no word is known that no caption has, or the other way round"


def test_words_by_place_and_what_is_not_known():
    text, words = "a photo of an apple and two dogs on a blue checked background", CaptionWords()
    assert len(text.split()) == longest_caption(2) == 13
    assert words_of(text, "an apple") == (3, 5)
    assert words_of(text, "two dogs") == (6, 8)
    assert words_of(text, "background") == (12, 13)
    for part in ("a", "pear", "", "apple an"):
        with pytest.raises(ValueError, match="stands"):
            words_of(text, part)
    assert words.encode("", 3) == [-1, -1, -1]
    with pytest.raises(ValueError, match="word 'pear'; known are"):
        words.encode("a pear", 16)
    with pytest.raises(ValueError, match="has 13 words; the model reads 12"):
        words.encode(text, 12)


def test_rows_depend_on_their_number_alone():
    pictures = CaptionedScenes(SceneOptions(**SCENES), CaptionedOptions(images=40, hidden_captions=0.3), 16, seed=3)
    rows = np.arange(64)
    whole = pictures.batch("train", rows)
    part = pictures.batch("train", rows[[40, 3]])
    assert all(torch.equal(a[[40, 3]], b) for a, b in zip(whole, part, strict=True))
    images, words, times, noise = whole
    assert images.shape == noise.shape == (64, 3, 32, 32)
    assert -1 <= images.min() < -0.5
    assert 0.5 < images.max() <= 1
    assert 8 <= (words < 0).all(1).sum() <= 32
    parts = np.histogram(np.arctan(np.exp(-times.numpy())), 4)[0]
    assert parts.min() >= 14, "times are spread evenly in the cosine schedule"
    assert abs(float(noise.std()) - 1) < 0.02
    other = CaptionedScenes(SceneOptions(**SCENES), CaptionedOptions(), 16, seed=4).batch("train", rows)
    assert not torch.equal(other[0], images)
    validation = pictures.batch("standard", rows)
    assert not torch.equal(validation[0], images)


def test_no_scene_comes_twice_and_ranks_share_a_batch():
    pictures = CaptionedScenes(SceneOptions(**SCENES), CaptionedOptions(images=16), 16, seed=0)
    alone, two = CaptionedStream(pictures, 0), [CaptionedStream(pictures, 0) for _ in range(2)]
    seen = []
    for _ in range(6):
        whole = alone.next(8, 0, 1)
        parts = [stream.next(4, rank, 2) for rank, stream in enumerate(two)]
        assert all(torch.equal(whole[i], torch.cat([part[i] for part in parts])) for i in range(4))
        seen.append(whole[0])
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 48


def test_the_loss_is_one_for_a_model_that_knows_nothing_and_does_not_depend_on_how_rows_are_cut():
    task = tiny_task()
    task.check()
    task.prepare(True)
    torch.manual_seed(0)
    model = task.model()
    images = task.validation()[0]
    deviation = float(images.square().mean().sqrt())
    batch = task.train.next(24, 0, 1)
    losses = task.measure(model, batch).detach()
    assert abs(float(losses.mean()) - 1) < 0.5, deviation
    whole = task.loss(model, batch, torch.tensor(24.0))
    cut = [task.loss(model, tuple(t[a:b] for t in batch), torch.tensor(24.0)) for a, b in ((0, 7), (7, 24))]
    assert torch.allclose(whole, sum(cut), rtol=1e-5)
    x0, words, times, noise = batch
    found = model(noised(x0, noise, times), times, words)
    share = model.scales(times)[1]
    assert torch.allclose(losses, (((found - x0) / share) ** 2).mean((1, 2, 3)), rtol=1e-5)
    assert len(task.validation()[0]) == 9
    assert torch.equal(task.validation(4)[0], images[:4])


def test_a_saved_model_draws_the_same(tmp_path):
    torch.manual_seed(0)
    task = tiny_task()
    model = task.model()
    with torch.no_grad():
        model.last.weight.normal_(std=0.05)
    task.save(tmp_path / "export", model, {"steps": 1})
    read = load_diffusion(tmp_path)
    assert read.data["styles"] == list(STYLES)
    texts = ["a photo of an apple on a red plain background", "a sketch of two cats on a gray dotted background"]
    given = TrainedDiffusion(model.eval(), task.pictures.words)
    one = given.draw(texts, [5, 6], steps=4)
    assert torch.equal(one, read.draw(texts, [5, 6], steps=4))
    assert torch.allclose(one[1:], read.draw(texts[1:], [6], steps=4), atol=1e-5)
    assert not torch.allclose(one[1:], read.draw(texts[1:], [7], steps=4), atol=1e-2)
    assert not torch.equal(one, read.draw(texts, [5, 6], steps=4, guidance=1.0))
    assert one.abs().max() <= 1
    with pytest.raises(ValueError, match="2 captions have 1 seeds"):
        read.draw(texts, [1])
    (tmp_path / "export" / "config.json").write_text('{"format": "attnzoo-diffusion-1", "model": {"vocab_size": 3}}')
    with pytest.raises(ValueError, match="is damaged"):
        load_diffusion(tmp_path)


def test_pixels_and_numbers():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = from_pixels(pixels)
    assert x.shape == (1, 3, 16, 16)
    assert (x.min(), x.max()) == (-1, 1)
    assert np.array_equal(to_pixels(x), pixels)
    assert to_pixels(torch.full((1, 3, 2, 2), 7.0)).max() == 255


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=stdlib", "data.source='stdlib': diffusion is trained on scenes"),
        ("data.styles=[photo, oil]", "styles holds 'oil'; known are photo, cartoon"),
        ("data.styles=[]", "must hold a style"),
        ("data.kindz=4", "unknown key data.kindz; did you mean 'kinds'"),
        ("data.kinds=3", "kinds=3 must be from 4"),
        ("data.images=0", "images=0 must be at least 1"),
        ("data.hidden_captions=1.0", "hidden_captions=1.0"),
        ("model.vocab_size=9", "model.vocab_size=9: the data determine it"),
        ("model.patch=3", "image_size=32 must be a multiple of 3"),
        ("model.words=12", "captions have up to 13 words"),
        ("data.most_objects=4", "captions have up to 19 words"),
        ("data.font=nope", "font='nope' is unknown"),
        ("task.fold=1", "task"),
        ("lora.rank=4", "lora"),
    ],
)
def test_configurations_that_cannot_be(override, message):
    with pytest.raises(ValueError, match=message):
        tiny_task(override).check()


def test_a_directory_of_something_else_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        save_diffusion(tmp_path, TrainedDiffusion(DiffusionUNet(tiny_task()._model_config()), CaptionWords()))
    assert (tmp_path / "notes.txt").read_text() == "mine"
