"""Sampling by the numbers."""

import math

import pytest
import torch

from attnzoo.models import GenerationConfig, Sampling, generate
from attnzoo.models.row_sampling import choose_rows, filter_rows, row_wish
from tests.helpers.serving import small_model

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
LOGITS = PROBABILITIES.log()


def sample(logits, temperature: float, top_p: float, top_k: int, generator=None) -> list[int | None]:
    """The token of each row. The rows' random numbers come from one generator, one row after the other."""
    options = GenerationConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    chosen = choose_rows(logits, [row_wish(options, logits, generator) for _ in logits])
    return [None if found is None else found[0] for found in chosen]


def kept(top_k: int, top_p: float) -> list[int]:
    return torch.isfinite(filter_rows(LOGITS - LOGITS.max(), [top_k], [top_p]))[0].nonzero()[:, 0].tolist()


def test_filter():
    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [1, 3]
    assert kept(9, 1.0) == [0, 1, 2, 3]
    assert kept(0, 0.35) == [1]
    assert kept(0, 0.65) == [1, 3]
    assert kept(0, 0.75) == [1, 2, 3]
    assert kept(0, 1e-9) == [1]
    assert kept(2, 0.6) == [1, 3]  # of the two that are left, the first has 4/7 of the mass


def test_frequencies_follow_the_temperature():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(sample(LOGITS.expand(10_000, -1), 0.5, 1.0, 0, generator))
    expected = PROBABILITIES[0] ** 2 / (PROBABILITIES[0] ** 2).sum()
    frequencies = torch.bincount(drawn, minlength=4) / 10_000
    assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / 10_000)


def test_greedy_takes_the_largest():
    assert sample(LOGITS, 0.0, 1.0, 0) == [1]


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-40, 1e-20, 9.9e-6])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (1e-300, 0), pytest.param(0.5, 2**70, id="all"), (5e-324, 1)])
def test_next_to_no_temperature_is_greedy(temperature, top_p, top_k):
    assert sample(LOGITS * 300, temperature, top_p, top_k) == [1]
    assert Sampling(temperature=temperature, top_p=top_p, top_k=top_k).top_k == top_k


@pytest.mark.parametrize("temperature", [1e-5, 1, 100.0, 1e30, 1e300, pytest.param(10**400, id="beyond-float")])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (1e-300, 0), pytest.param(1 - 1e-16, 2**70, id="all"), (0.5, 3)]
)
def test_draws_at_every_extreme_are_among_those_that_are_left(temperature, scale, top_p, top_k):
    logits = (LOGITS * scale).expand(50, -1)
    drawn = set(sample(logits, temperature, top_p, top_k, torch.Generator().manual_seed(0)))
    assert drawn <= {0, 1, 2, 3}
    if top_p == 1e-300:
        assert len(drawn) == 1
        assert drawn == {1} or temperature >= 1e30  # where the scaled logits may all be equal
    if temperature >= 1e30 and top_p == 1.0:
        assert drawn == {0, 1, 2, 3}


def test_a_temperature_that_divides_beyond_float32_leaves_the_likely_ones():
    """1e-5 is drawn, not greedy: of two equally likely tokens both come, and no other."""
    logits = torch.tensor([[3e38, 3e38, -3e38, 0.0]]).expand(64, -1)
    drawn = sample(logits, 1e-5, 1.0, 0, torch.Generator().manual_seed(0))
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_without_a_finite_maximum_have_no_token(value, temperature):
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = value
    found = sample(logits, temperature, 0.35, 0)
    assert found == [1, None, 1]
    assert sample(torch.full((1, 4), -math.inf), temperature, 1.0, 0) == [None]
    masked = LOGITS.masked_fill(torch.tensor([True, False, True, True]), -math.inf)
    assert sample(masked, temperature, 0.9, 0) == [1]


def test_filters_mix_no_devices():
    """Tensors of the meta device refuse to meet those of a CPU, as a GPU's do."""
    logits = torch.empty(3, 5, device="meta")
    assert filter_rows(logits, [2, 0, 9], [0.5, 1.0, 0.9]).device == logits.device


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": -1e-300}, "temperature=-1e-300"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_p": 10**400}, "top_p=1000"),
        ({"top_k": -(2**70)}, "top_k=-11805"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_generation_refuses_what_it_cannot_do():
    model = small_model("mha")
    for options, message in (({"seed": 2**64}, "seed=18446744073709551616"), ({"max_new_tokens": -1}, "tokens=-1")):
        with pytest.raises(ValueError, match=message):
            generate(model, [[5]], **{"max_new_tokens": 2, **options})
    hot = Sampling(temperature=1e-40, top_p=0.3)
    assert generate(model, [[5, 6]], max_new_tokens=5, sampling=hot) == generate(model, [[5, 6]], max_new_tokens=5)
