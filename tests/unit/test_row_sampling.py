"""Rows that are drawn together are the rows drawn one at a time, bit for bit."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnzoo.models import GenerationConfig
from attnzoo.models import row_sampling as rows
from attnzoo.models.logit_changes import LogitChanges
from attnzoo.models.row_sampling import choose_rows, exponential_noise, row_wish
from serve.request import SamplingParams
from serve.sampler import sample_rows
from tests.helpers.sampling_oracle import drawn_token, kept_logits, logprobs_of

WIDTH = 5003
OPTIONS = [
    GenerationConfig(temperature=temperature, top_p=top_p, top_k=top_k, logprobs=logprobs)
    for (temperature, top_p, top_k), logprobs in zip(
        itertools.product((0.7, 1.0, 3.0), (1.0, 0.9, 0.999995, 0.3), (0, 7, 50, WIDTH)),
        itertools.cycle((None, 0, 3, None, 20)),
        strict=False,
    )
] + [GenerationConfig(), GenerationConfig(logprobs=4)]


def logits_of(dtype: torch.dtype, spread: float, count: int = len(OPTIONS)) -> Tensor:
    """In bfloat16 many of them are equal, beside each other in the order too."""
    return (torch.randn(count, WIDTH) * spread).to(dtype)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + row) for row in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 2.0, 6.0])
def test_every_row_gets_the_token_that_it_would_get_alone(dtype, spread):
    own, same = generators(len(OPTIONS)), generators(len(OPTIONS))
    for _ in range(4):
        logits = logits_of(dtype, spread)
        found = choose_rows(logits, [row_wish(o, logits, g) for o, g in zip(OPTIONS, own, strict=True)])
        for row, (options, generator) in enumerate(zip(OPTIONS, same, strict=True)):
            one = logits[row : row + 1]
            token = drawn_token(one, options.temperature, options.top_p, options.top_k, generator)
            logprobs = None if options.logprobs is None else logprobs_of(one[0], token, options.logprobs)
            assert found[row] == (token, logprobs), options
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(own[:-2], same[:-2], strict=True))


@pytest.mark.parametrize("width", [1, 2, 3, 65])
def test_few_tokens(width):
    logits = torch.randn(len(OPTIONS), width)
    found = choose_rows(
        logits, [row_wish(o, logits, g) for o, g in zip(OPTIONS, generators(len(OPTIONS)), strict=True)]
    )
    for row, (options, generator) in enumerate(zip(OPTIONS, generators(len(OPTIONS)), strict=True)):
        one = logits[row : row + 1]
        token = drawn_token(one, options.temperature, options.top_p, options.top_k, generator)
        assert found[row] is not None
        assert found[row][0] == token
        assert options.logprobs is None or len(found[row][1].top) == min(options.logprobs, width)


def test_noise_is_that_of_multinomial():
    for seed in range(20):
        one, other = generators(2, seed), generators(2, seed)
        expected = torch.stack([torch.empty(WIDTH).exponential_(1, generator=g) for g in one])
        found = torch.stack([exponential_noise([WIDTH], g, torch.device("cpu")) for g in other])
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)  # another logarithm may round otherwise
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0, 8.0])
def test_the_nucleus_is_that_of_all_tokens_in_order(dtype, spread, monkeypatch):
    """By few tokens or by all of them; ties go to those that come first."""
    logits = logits_of(dtype, spread, 60).float()
    logits -= logits.amax(-1, keepdim=True)
    top_p = [0.05, 0.5, 0.8, 0.9, 0.95, 0.99] * 10
    for few in (32, 1024):
        monkeypatch.setattr(rows, "NUCLEUS", few)
        found = rows.filter_rows(logits, [0] * 60, top_p)
        for row, mass in enumerate(top_p):
            assert torch.equal(found[row], kept_logits(logits[row : row + 1], 0, mass)[0])


@pytest.mark.parametrize("width", range(2, 40, 3))
def test_where_a_sum_is_top_p_itself_rounding_decides_as_it_always_did(width):
    top_p = [part / width for part in range(1, width)]
    logits = torch.zeros(width - 1, width)
    found = rows.filter_rows(logits, [0] * (width - 1), top_p)
    expected = torch.cat([kept_logits(row[None], 0, mass) for row, mass in zip(logits, top_p, strict=True)])
    assert torch.equal(found, expected)


def test_usual_logits_are_not_sorted(monkeypatch):
    sorted_rows = []
    inner = rows._nucleus_by_sorting

    def by_sorting(scaled, top_p):
        sorted_rows.append(len(scaled))
        return inner(scaled, top_p)

    monkeypatch.setattr(rows, "_nucleus_by_sorting", by_sorting)
    logits = logits_of(torch.float32, 4.0, 200)
    logits -= logits.amax(-1, keepdim=True)
    rows.filter_rows(logits, [0] * 200, [0.9] * 200)
    assert sum(sorted_rows) < 20


def test_rows_in_several_blocks(monkeypatch):
    logits = logits_of(torch.float32, 2.0)
    whole = choose_rows(
        logits, [row_wish(o, logits, g) for o, g in zip(OPTIONS, generators(len(OPTIONS)), strict=True)]
    )
    monkeypatch.setattr(rows, "BLOCK", 3 * WIDTH)
    wishes = [row_wish(o, logits, g) for o, g in zip(OPTIONS, generators(len(OPTIONS)), strict=True)]
    assert choose_rows(logits, wishes) == whole


@dataclass
class Row:
    """What `sample_rows` reads of a request."""

    params: SamplingParams
    generator: torch.Generator | None
    group: object = None
    changes: LogitChanges | None = None


def requests() -> list[Row]:
    hot = [SamplingParams(temperature=0.9, top_p=0.8, seed=seed, logprobs=2) for seed in range(4)]
    return [Row(params, torch.Generator().manual_seed(seed)) for seed, params in enumerate(hot)]


def test_one_transfer_for_all_rows(monkeypatch):
    count = []
    inner = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: count.append(1) or inner(self))
    sample_rows(torch.randn(4, 300), requests())
    assert len(count) == 1


def test_a_row_without_numbers_and_one_without_random_ones_fail_alone():
    logits = torch.randn(4, 300)
    expected = sample_rows(logits, requests())
    bad = logits.clone()
    bad[1, 7] = torch.nan
    asked = requests()
    asked[2].generator = "none"
    found = sample_rows(bad, asked)
    assert "not finite" in str(found[1])
    assert isinstance(found[2], TypeError)
    assert [found[0], found[3]] == [expected[0], expected[3]]


def test_a_row_that_fails_among_others_fails_alone_and_nobody_draws_twice(monkeypatch):
    logits = torch.randn(4, 300)
    expected = sample_rows(logits, requests())
    asked = requests()
    inner = rows.draw_tokens
    guilty = []

    def draw(logits_BV, largest_B1, draws):
        guilty.extend(d.noise_V for d in draws[2:3] if not guilty)
        if any(d.noise_V is guilty[0] for d in draws):
            raise RuntimeError("guilty")
        return inner(logits_BV, largest_B1, draws)

    monkeypatch.setattr(rows, "draw_tokens", draw)
    found = sample_rows(logits, asked)
    assert str(found[2]) == "guilty"
    assert [found[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]


def test_one_greedy_request_in_several_rows():
    request = Row(SamplingParams(logprobs=1), None)
    logits = torch.randn(3, 300)
    found = sample_rows(logits, [request] * 3)
    assert [token for token, _ in found] == logits.argmax(-1).tolist()
