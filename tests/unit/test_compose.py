"""Composition: scores of one picture in the attention of another, words in their region, boxes at borders."""

import dataclasses

import numpy as np
import pytest
import torch

from attnzoo.attention.edits import Span
from attnzoo.models import DiffusionConfig, DiffusionUNet, Infusion
from attnzoo.models.diffusion_infusion import places, spans_of
from attnzoo.vision import CaptionWords
from attnzoo.vision.compose import ComposeOptions, Placement, _Walk, compose, invert, invert_cases
from attnzoo.vision.trained_diffusion import TrainedDiffusion, from_pixels, to_pixels


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    words = CaptionWords()
    sizes = {"vocab_size": len(words), "image_size": 16, "widths": (16, 16), "num_heads": 2, "text_dim": 16}
    model = DiffusionUNet(DiffusionConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedDiffusion(model, words)


def case(left=3, top=5, size=6, seed=0):
    random = np.random.default_rng(seed)
    thing = random.integers(0, 256, (size, size, 4), dtype=np.uint8)
    thing[..., 3] = 255
    thing[0, :, 3] = 0
    return Placement(
        background=random.integers(0, 256, (16, 16, 3), dtype=np.uint8),
        thing=thing,
        left=left,
        top=top,
        background_caption="a sketch of a car on a blue plain background",
        caption="a sketch of a car and a dog on a blue plain background",
        words="a dog",
    )


def scores_and_values(layer, x, context):
    """(scores [N, T, S], values [N, S, H]) of one picture's queries and another's keys, from the weights themselves."""
    heads, dim = layer.config.num_heads, layer.config.model_dim
    weights = {name.rpartition(".")[0].rpartition(".")[2]: w for name, w in layer.state_dict().items()}
    q, k, v = (
        (y @ weights[name].T).reshape(len(y), heads, -1).transpose(0, 1)
        for y, name in ((x, "query"), (context, "key"), (context, "value"))
    )
    return q @ k.mT / (dim // heads) ** 0.5, v, weights["output"]


@torch.no_grad()
def test_infusion_by_hand():
    """Against the formula in plain products, an object in the middle, one of a single place, none at all."""
    torch.manual_seed(1)
    layer = DiffusionUNet(DiffusionConfig(vocab_size=4, widths=(16,), num_heads=2)).double().attentions()["middle.self"]
    x = torch.randn(6, 16, 16, dtype=torch.float64)
    region = torch.zeros(3, 32, 32, dtype=torch.bool)
    region[0, 8:24, 0:16], region[1, 3, 3] = True, True
    objects = [[4, 5, 8, 9], [0], []]
    assert [row.nonzero()[:, 0].tolist() for row in places(region, 4)] == objects
    found = Infusion(region).attend(layer, x)
    for row, keys in enumerate(objects):
        one, other = x[row], x[3 + row]
        s, v, output = scores_and_values(layer, other, one)
        own, v_own, _ = scores_and_values(layer, one, one)
        composed = torch.zeros(2, 16, 8, dtype=torch.float64)
        if keys:
            outside = [place for place in range(16) if place not in keys]
            own[:, :, keys] = s[:, :, keys]
            own[:, [[key] for key in keys], outside] = s[:, outside][:, :, keys].mT
            composed = s[:, :, keys].softmax(-1) @ v[:, keys]
        for place, expected in ((row, own.softmax(-1) @ v_own), (3 + row, composed)):
            expected = expected.transpose(0, 1).flatten(1) @ output.T
            torch.testing.assert_close(found[place], expected, atol=1e-6, rtol=1e-6)  # scores are read in float32
    with pytest.raises(ValueError, match="5 rows are given; infusion of 3 objects takes 6"):
        Infusion(region).attend(layer, x[:5])


@pytest.mark.parametrize(
    ("left", "top", "box"),
    [(3, 5, (5, 11, 3, 9)), (-2, 5, (5, 11, 0, 4)), (13, 13, (13, 16, 13, 16)), (-5, -4, (0, 2, 0, 1))],
)
def test_boxes_at_borders(left, top, box):
    given = case(left, top)
    rows, columns = given.box()
    assert (rows.start, rows.stop, columns.start, columns.stop) == box
    image, region = given.pasted(), given.region()
    changed = (image != given.background).any(-1)
    assert not (changed & ~region).any()
    assert region.sum() == (box[1] - max(box[0], top + 1)) * (box[3] - box[2])
    assert np.array_equal(image[region], given.thing[rows.start - top :, columns.start - left :][
        : box[1] - box[0], : box[3] - box[2]][region[rows, columns]][:, :3])  # fmt: skip


@torch.no_grad()
def test_latents_of_an_inversion_lead_back(trained):
    image, text = from_pixels(case().background[None]), [case().background_caption]
    latents = invert(trained, image, text, 40)
    assert len(latents) == 41
    assert torch.equal(latents[-1], image)
    words = trained.encode(text)
    from attnzoo.diffusion import grid, solve

    back = solve(latents[0], lambda x, time: trained.model(x, x.new_full((1,), time), words), grid(40))
    assert (back - image).abs().max() < 0.1


@torch.no_grad()
def test_compositions_share_an_inversion(trained):
    cases, options = [case(), case(-2, 12, seed=1)], ComposeOptions(steps=3)
    inverted = invert_cases(trained, cases, 3)
    assert torch.equal(compose(trained, cases, options, inverted), compose(trained, cases, options))
    for steps, some in ((4, cases), (3, cases[:1])):
        with pytest.raises(
            ValueError, match=f"inverted has 3 steps of 2 cases; here are steps={steps} and {len(some)}"
        ):
            compose(trained, some, ComposeOptions(steps=steps), inverted)


def test_regions_as_spans():
    region = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert spans_of(region) == (Span(0, 2), Span(3, 4), Span(6, 8))
    assert spans_of(~region) == (Span(2, 3), Span(4, 6))
    assert spans_of(torch.zeros(3, dtype=torch.bool)) == ()


@torch.no_grad()
def test_the_background_outside_of_the_box_stays(trained):
    cases = [case(), case(-2, 12, seed=1)]
    out = compose(trained, cases, ComposeOptions(steps=5, kept=1.0))
    assert out.shape == (2, 3, 16, 16)
    for row, given in enumerate(cases):
        outside = np.ones((16, 16), bool)
        outside[given.box()] = False
        assert np.array_equal(to_pixels(out)[row][outside], given.background[outside])
        assert not np.array_equal(to_pixels(out)[row][~outside], given.background[~outside])
    alone = compose(trained, cases[1:], ComposeOptions(steps=5, kept=1.0))
    assert torch.allclose(out[1:], alone, atol=1e-4), "a case depends on no other"
    pasted = compose(trained, cases, ComposeOptions(steps=5, kept=1.0, pasted=1.0))
    region = cases[0].region()
    assert np.array_equal(to_pixels(pasted)[0][region], cases[0].pasted()[region])


@torch.no_grad()
def test_every_part_changes_the_picture(trained):
    plain = {"steps": 5, "guidance": 2.0, "infused": 0.4, "pasted": 0.0, "kept": 0.4}
    whole = compose(trained, [case()], ComposeOptions(**plain))
    for change in ({"infused": 0.0}, {"confined": False}, {"kept": 0.8}, {"pasted": 0.4}, {"guidance": 1.0}):
        other = compose(trained, [case()], ComposeOptions(**{**plain, **change}))
        assert (whole - other).abs().max() > 1e-3, change


@torch.no_grad()
def test_words_are_confined_to_their_region(trained):
    """The weights of the object's words are 0 at queries outside of its region, at every level, and others are not."""
    walk = _Walk(trained, [case(), case(-4, 5)], ComposeOptions(steps=2))
    runs = walk._confined(4)
    assert set(runs) == {name for name in trained.model.attentions() if name.endswith("cross")}
    for name, rows in runs.items():
        assert [row is None for row in rows] == [True, True, False, False] * 2
        inside = places(walk.region_NHW, trained.model.side(name))
        for number, row in enumerate(rows[2:4]):
            (meant,) = row.plan.layers[0].items
            queries = {p for start, stop in meant.queries.intervals for p in range(start, stop)}
            assert queries == set((~inside[number]).nonzero()[:, 0].tolist())
    _, span = walk.words_NL, walk.spans[0]
    assert [trained.words.words[i] for i in walk.words_NL[0, span[0] : span[1]]] == ["a", "dog"]


@torch.no_grad()
def test_guidance_is_as_the_paper_has_it(trained):
    options = ComposeOptions(steps=4, guidance=1.7, infused=0.5, confined=False)
    walk = _Walk(trained, [case()], options)
    x, time = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 0.5
    found = walk.denoise(x, time)

    def seen(words, infusion=None, also=()):
        given = torch.cat([x, *also])
        return trained.model(given, given.new_full((len(given),), time), words, infusion=infusion)[:1]

    a, b = seen(walk.empty_NL), seen(walk.words_NL)
    composed = walk.composed(0)
    infused = [
        seen(words.repeat(2, 1), Infusion(walk.region_NHW), [composed]) for words in (walk.empty_NL, walk.words_NL)
    ]
    expected = a + 1.7 * (infused[1] - infused[0]) + 1.7 * (infused[1] - b)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    walk.after(0, x), walk.after(1, x)
    torch.testing.assert_close(walk.denoise(x, time), a + 1.7 * (b - a), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": 16}, "left=16, top=5 is not in the picture"),
        ({"words": "a cat"}, "'a cat' stands 0 times"),
        ({"words": "a"}, "'a' stands"),
        ({"caption": "a sketch of a pear"}, "the word 'pear'"),
        ({"background": np.zeros((8, 16, 3), np.uint8)}, r"cases\[0\].background is uint8 \[8, 16, 3\]"),
        ({"background": np.zeros((16, 16, 3))}, "background is float64"),
        ({"thing": np.zeros((4, 4, 3), np.uint8)}, "thing is uint8"),
        ({"thing": np.zeros((4, 4, 4), np.uint8)}, "or transparent"),
    ],
)
def test_cases_that_cannot_be(trained, change, message):
    with pytest.raises(ValueError, match=message):
        compose(trained, [dataclasses.replace(case(), **change)], ComposeOptions(steps=1))


def test_options_and_variants_that_cannot_be(trained):
    for wrong in ({"steps": 0}, {"infused": 1.1}, {"kept": -0.1}, {"guidance": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ComposeOptions(**wrong)
    with pytest.raises(ValueError, match="nothing to compose"):
        compose(trained, [], ComposeOptions())


def test_each_step_is_told_and_may_end_the_work(trained):
    """Inversion of background and paste, then generation; the last picture told is nearly that which is returned."""
    seen = []
    options = ComposeOptions(steps=4)
    found = compose(trained, [case()], options, tell=seen.append)
    assert torch.equal(found, compose(trained, [case()], options))
    assert len(seen) == 3 * options.steps
    assert all(each.shape == found.shape for each in seen)
    inverted = invert_cases(trained, [case()], 4)
    compose(trained, [case()], options, inverted, tell=seen.append)
    assert len(seen) == 4 * options.steps
    drawn = trained.draw(["a dog"], [1], steps=3, tell=seen.append)
    assert torch.equal(drawn, trained.draw(["a dog"], [1], steps=3))
    assert len(seen) == 4 * options.steps + 3

    def ends(x0):
        raise InterruptedError

    for work in (lambda: compose(trained, [case()], options, tell=ends), lambda: trained.draw(["a"], [1], tell=ends)):
        with pytest.raises(InterruptedError):
            work()
