"""Diffusion: the solver against closed forms, the model's words, time and attention."""

import itertools

import pytest
import torch

from attnzoo.attention.edits import EditRun, Edits, Hide, Map, TokenLayout, Where, layer_sizes
from attnzoo.diffusion import grid, guided, image_part, noise_part, noised, solve, training_time
from attnzoo.diffusion.schedule import IMAGE, NOISE
from attnzoo.models import DiffusionConfig, DiffusionUNet


def toy(seed=0, centres=8, dim=64, spread=0.05):
    """(points, their exact denoiser) of Gaussians of that spread around centres."""
    generator = torch.Generator().manual_seed(seed)
    mean_KD = torch.randn(centres, dim, generator=generator, dtype=torch.float64)
    picked = torch.randint(centres, (256,), generator=generator)
    points = mean_KD[picked] + spread * torch.randn(256, dim, generator=generator, dtype=torch.float64)

    def denoise(x, half_log_snr):
        time = torch.tensor(half_log_snr, dtype=torch.float64)
        alpha, sigma = image_part(time), noise_part(time)
        variance = (alpha * spread) ** 2 + sigma**2
        share_NK = (-((x[:, None] - alpha * mean_KD) ** 2).sum(-1) / (2 * variance)).softmax(-1)
        mean = share_NK @ mean_KD
        return mean + alpha * spread**2 / variance * (x - alpha * mean)

    return points, denoise


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(("steps", "most"), [(20, 3e-3), (50, 5e-4)])
def test_inversion_and_generation_give_the_points_back(steps, most):
    points, denoise = toy()
    noise = solve(points, denoise, grid(steps, start=IMAGE, end=NOISE))
    assert abs(rms(noise) - 1) < 0.03
    assert rms(solve(noise, denoise, grid(steps)) - points) <= most


def test_the_solver_is_of_second_order():
    """For one Gaussian, whose denoiser is smooth: half the step, a quarter of the error (against 1,280 steps)."""
    points, denoise = toy(centres=1, spread=0.5)
    exact = solve(points, denoise, grid(1280))
    errors = [rms(solve(points, denoise, grid(steps)) - exact) for steps in (20, 40, 80)]
    assert all(3.3 < coarse / fine < 4.7 for coarse, fine in itertools.pairwise(errors)), errors


def test_a_walk_under_a_constant_image_ends_in_it():
    aim, x = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    seen = []

    def watch(step, x):
        seen.append(step)
        return x

    found = solve(x, lambda x, time: aim, grid(7), watch=watch)
    first, last = torch.tensor(NOISE, dtype=torch.float64), torch.tensor(IMAGE, dtype=torch.float64)
    noise = (x - image_part(first) * aim) / noise_part(first)
    assert torch.allclose(found, noised(aim, noise, last.expand(2)), atol=1e-12)
    assert seen == list(range(7))


@pytest.mark.parametrize("times", [[0.0], [0.0, 1.0, 0.5], [1.0, 1.0], []])
def test_times_that_turn_are_refused(times):
    with pytest.raises(ValueError, match="only rise or only fall"):
        solve(torch.zeros(1, 1, 1, 1), lambda x, time: x, torch.tensor(times, dtype=torch.float64))


def test_parts_and_times():
    times = training_time(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert torch.allclose(image_part(times) ** 2 + noise_part(times) ** 2, torch.ones(101, dtype=torch.float64))
    assert torch.allclose(times[[0, 50, 100]], torch.tensor([IMAGE, 0.0, NOISE], dtype=torch.float64), atol=1e-9)
    angle = torch.atan2(noise_part(times), image_part(times))  # the cosine schedule: even in the angle
    assert torch.allclose(angle.diff(), angle.diff()[0].expand(100))
    with pytest.raises(ValueError, match="steps=0"):
        grid(0)


SMALL = {"vocab_size": 20, "image_size": 16, "widths": (16, 24), "num_heads": 2, "text_dim": 16, "words": 6}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = DiffusionUNet(DiffusionConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # those that begin at zero as well
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(rows=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 16, 16, generator=generator)
    words = torch.tensor([[3, 4, 5, -1], [7, -1, -1, -1], [-1, -1, -1, -1]])[:rows]
    return x, torch.tensor([-4.0, 0.0, 4.0])[:rows], words


@torch.no_grad()
def test_rows_padding_and_empty_captions(unet):
    x, times, words = batch()
    out = unet(x, times, words)
    for row in range(3):
        alone = unet(x[row : row + 1], times[row : row + 1], words[row : row + 1])
        assert torch.allclose(out[row : row + 1], alone, atol=1e-5)
    assert torch.allclose(out[1:2], unet(x[1:2], times[1:2], words[1:2, :1]), atol=1e-5)
    assert torch.equal(out, unet(x, times, unet.encode(words)))
    assert torch.allclose(out[2:], unet(x[2:], times[2:], torch.empty(1, 0, dtype=torch.long)), atol=1e-5)
    assert (out - unet(x, times, words.flip(1))).abs().amax((1, 2, 3))[0] > 1e-4, "the order of words is seen"


@torch.no_grad()
def test_words_reach_the_image_by_cross_attention_alone(unet):
    """With all words hidden in every cross attention, a caption is the empty one."""
    x, times, words = batch(2)
    runs = {}
    for name, layer in unet.attentions().items():
        if name.endswith("cross"):
            layout = TokenLayout(prompt=unet.side(name) ** 2, context=TokenLayout(prompt=4))
            plan = Edits(Hide(Where())).plan([layer_sizes(layer, context=True)], layout, streams=False)
            runs[name] = [EditRun(plan) for _ in range(2)]
    hidden = unet(x, times, words, edits=runs)
    empty = unet(x, times, torch.full_like(words, -1))
    assert torch.allclose(hidden, empty, atol=1e-6)
    assert not torch.allclose(unet(x, times, words), empty, atol=1e-3)


@torch.no_grad()
def test_maps_of_every_layer_can_be_read(unet):
    x, times, words = batch(2)
    runs = {}
    for name, layer in unet.attentions().items():
        cross = name.endswith("cross")
        layout = TokenLayout(prompt=unet.side(name) ** 2, context=TokenLayout(prompt=4) if cross else None)
        plan = Edits(Map()).plan([layer_sizes(layer, context=cross)], layout, streams=False)
        runs[name] = [EditRun(plan) for _ in range(2)]
    assert torch.allclose(unet(x, times, words, edits=runs), unet(x, times, words), atol=1e-5)
    for name, rows in runs.items():
        weights = rows[0].reading[0].map.float()
        places = unet.side(name) ** 2
        assert weights.shape == (2, places, 4 if name.endswith("cross") else places)
        assert torch.allclose(weights.sum(-1), torch.ones(2, places), atol=2e-3)
        if name.endswith("cross"):
            assert (weights[..., 3] == 0).all(), "a word that is none has no weight"


@torch.no_grad()
def test_a_new_model_sees_the_linear_estimate():
    model = DiffusionUNet(DiffusionConfig(**SMALL, data_deviation=0.4))
    x, times, words = batch()
    keep, _, _ = model.scales(times)
    assert torch.equal(model(x, times, words), keep * x)
    images = 0.4 * torch.randn(4096, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4096, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for time in (-3.0, 0.0, 3.0):
        at = torch.full((4096,), time)
        keep, share, size = (part.flatten()[0] for part in model.scales(at))
        seen = noised(images, noise, at)
        assert abs(rms(seen) * size - 1) < 0.02
        best = (seen * images).mean() / seen.square().mean()
        assert abs(best - keep) < 0.02
        assert abs(rms(images - keep * seen) / share - 1) < 0.02


@torch.no_grad()
def test_guidance(unet):
    x, _, words = batch(2)
    empty, times = torch.full_like(words, -1), torch.full((2,), 1.0)
    given, none = unet(x, times, words), unet(x, times, empty)
    for scale, expected in ((0, none), (1, given), (3, none + 3 * (given - none))):
        assert torch.allclose(guided(unet, words, empty, scale)(x, 1.0), expected, atol=1e-5)


def test_gradients_reach_all_weights():
    torch.manual_seed(0)
    model = DiffusionUNet(DiffusionConfig(**SMALL))
    x, times, words = batch()
    for _ in range(5):  # the first steps leave weights before those that begin at zero without a gradient
        model.zero_grad()
        (model(x, times, words) - x.flip(0)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    assert [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 18}, "image_size=18 must be a multiple of 4"),
        ({"widths": ()}, "widths=\\[\\] must be channels"),
        ({"widths": (16, 0)}, "each at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"data_deviation": 0.0}, "data_deviation=0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"widths": (15, 24)}, "model_dim=15"),
        ({"attention": "nope"}, "nope"),
        ({"text_layers": -1}, "text_layers=-1"),
    ],
)
def test_configurations_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        DiffusionUNet(DiffusionConfig(**{**SMALL, **wrong}))


def test_configuration_as_a_mapping():
    config = DiffusionConfig(**SMALL, residual_blocks=2, attention="mdha")
    assert DiffusionConfig.from_dict(config.to_dict()) == config


@torch.no_grad()
def test_inputs_that_do_not_fit(unet):
    x, times, words = batch()
    for given, message in [
        ((x[:, :2], times, words), "x_NCHW has shape"),
        ((x, times[:2], words), "half_log_snr_N has shape"),
        ((x, times, words[:2]), "words_NL has shape"),
        ((x, times, torch.zeros(3, 7, dtype=torch.long)), "6 at most"),
        ((x, times, words + 20), "id 27; vocab_size=20"),
    ]:
        with pytest.raises(ValueError, match=message):
            unet(*given)
