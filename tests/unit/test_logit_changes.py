"""Penalties, biases and bars by the numbers, and what is refused of them."""

import math
import random
from functools import partial

import pytest
import torch

from attnzoo.models import GenerationConfig, Sampling, generate
from attnzoo.models.logit_changes import LogitChanges
from attnzoo.models.row_sampling import choose_rows, draw_tokens, drop_unlikely, row_wish
from attnzoo.models.sampling import check_known
from serve.request import SamplingParams
from tests.helpers.penalty_oracle import OPTIONS, greedy_tokens, penalised, soft
from tests.helpers.serving import TOKENS, small_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_those_of_a_loop_over_numbers(name):
    """Token by token, in either half of the numbers' range. Kills: the prompt counted as generated; a token counted
    once; the sign of negative logits; another order."""
    options, draw, prompt = Sampling(**OPTIONS[name]), random.Random(2), [1, 4, 4, -1, 9]
    changes = LogitChanges.of(options, prompt, 16, CPU)
    tokens: list[int] = []
    for step in range(12):
        logits = [draw.uniform(-4, 4) for _ in range(16)]
        barred = (2, 4) if step < 3 else ()
        found = changes.apply(torch.tensor(logits), tokens, barred).tolist()
        assert found == pytest.approx(penalised(logits, options, prompt, tokens, barred), rel=1e-5)
        tokens.append(draw.choice([3, 4, 5, 5, 5, 12]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_as_they_are_for_others(dtype):
    """Row by row in one batch; log probabilities are the model's own, and what was given is not written to."""
    logits = torch.randn(3, 16).to(dtype)
    given = logits.clone()
    options = GenerationConfig(logit_bias={5: 90.0}, logprobs=2)
    changes = LogitChanges.of(options, [1], 16, CPU)
    wishes = [row_wish(GenerationConfig(logprobs=2), logits, None) for _ in range(3)]
    plain = choose_rows(logits, wishes)
    wishes[1] = row_wish(options, logits, None, partial(changes.apply, tokens=[]))
    found = choose_rows(logits, wishes)
    assert found[::2] == plain[::2]
    token, logprobs = found[1]
    assert token == 5
    assert logprobs.logprob == pytest.approx(float(logits[1].float().log_softmax(-1)[5]))
    assert logprobs.top == plain[1][1].top
    changes.apply(logits[1], [2])
    assert torch.equal(logits, given)


def test_what_is_not_finite_stays_so():
    logits = torch.randn(2, 8)
    logits[0, 3] = math.nan
    changes = LogitChanges.of(Sampling(presence_penalty=1.0), [], 8, CPU)
    wish = row_wish(GenerationConfig(), logits, None, partial(changes.apply, tokens=[3]))
    assert choose_rows(logits, [wish, wish])[0] is None


@pytest.mark.parametrize("usual", [{}, {"temperature": 0.7, "top_k": 4, "min_p": 0.2, "logit_bias": {}}])
def test_usual_requests_change_nothing(usual):
    assert LogitChanges.of(Sampling(**usual), [1, 2], 8, CPU) is None
    assert LogitChanges.of(Sampling(**usual), [1, 2], 8, CPU, bars=True) is not None


def test_min_p_keeps_what_is_at_least_a_share_of_the_likeliest():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = (probabilities / 0.5).log().expand(5, -1)
    shares = [0.0, 0.1, 0.2, 0.4, 1.0]
    kept = [row.isfinite().sum().item() for row in drop_unlikely(logits, shares)]
    assert kept == [5, 5, 3, 2, 1]
    assert drop_unlikely(logits, [0.0] * 5) is logits


def test_min_p_goes_by_the_temperature_and_comes_first():
    """At a temperature of 2 a share of .25 is one of .5, and top_p is of what is left. Kills: min_p before the
    temperature; top_p of all tokens."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    def drawn(**options):
        config = GenerationConfig(**options)
        found = set()
        for seed in range(200):
            wish = row_wish(config, logits, torch.Generator().manual_seed(seed))
            found.add(int(draw_tokens(logits, logits.max(-1, keepdim=True).values, [wish.draw])))
        return found

    assert drawn(temperature=1.0, min_p=0.45) == {0, 1}
    assert drawn(temperature=1.0, min_p=0.55) == {0}
    assert drawn(temperature=2.0, min_p=0.55) == {0, 1}
    assert drawn(temperature=1.0, min_p=0.45, top_p=0.6) == {0}  # .67 of the two
    assert drawn(temperature=1.0, top_p=0.6) == {0, 1}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["mha", "rcmha"])
def test_a_continuation_is_that_of_the_loop(kind, name):
    """Of several prompts and continuations side by side, each by its own tokens. Kills: tokens of another row."""
    model, options = soft(small_model(kind)), OPTIONS[name]
    prompts = [[5, 6, 7], [9, 9, 9, 9], [3]]
    found = generate(model, prompts, max_new_tokens=12, sampling=Sampling(**options))
    assert found == [greedy_tokens(model, prompt, Sampling(**options), 12) for prompt in prompts]
    assert found != generate(model, prompts, max_new_tokens=12)


@pytest.mark.parametrize("kind", [Sampling, GenerationConfig, SamplingParams])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"min_p": -0.1}, r"min_p=-0\.1 must be between 0 \(off\) and 1"),
        ({"min_p": math.nan}, "min_p=nan must be between"),
        ({"min_p": "much"}, "min_p='much' has type str; it must be a number"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be between -2 and 2"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty=-inf must be between"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan must be above 0"),
        ({"repetition_penalty": True}, "repetition_penalty=True has type bool"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\] has type list"),
        ({"logit_bias": {"5": 1}}, "logit_bias has the key '5'; keys are token ids"),
        ({"logit_bias": {-1: 1}}, "logit_bias has the key -1"),
        ({"logit_bias": {5: "x"}}, r"logit_bias\[5\]='x' has type str"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\]=101 must be between -100 and 100"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_named(kind, given, said):
    with pytest.raises(ValueError, match=said):
        kind(**given)


def test_a_biased_token_is_one_of_the_vocabulary():
    check_known("logit_bias", {7: 1.0}, 8)
    with pytest.raises(ValueError, match="logit_bias has token 8, which is outside the vocabulary of 8"):
        check_known("logit_bias", {8: 1.0}, 8)
    with pytest.raises(ValueError, match=f"logit_bias has token {TOKENS + 500}"):
        generate(small_model("mha"), [[5]], max_new_tokens=2, sampling=Sampling(logit_bias={TOKENS + 500: 1.0}))


def test_repetition_and_min_p_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    prompt, logits = [1, 4, 9], torch.randn(1, 32) * 3
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty=1.7)
    theirs = processor(torch.tensor([[*prompt, 5, 5]]), logits.clone())
    changes = LogitChanges.of(Sampling(repetition_penalty=1.7), prompt, 32, CPU)
    torch.testing.assert_close(changes.apply(logits[0], [5, 5]), theirs[0])
    scaled = logits - logits.max()
    warped = transformers.MinPLogitsWarper(min_p=0.07)(None, scaled.clone())
    assert torch.equal(drop_unlikely(scaled, [0.07]), warped)
