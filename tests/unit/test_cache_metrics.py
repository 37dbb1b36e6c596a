"""What is computed of measured caches: fidelity and accuracy by hand, the search for a budget."""

import math

import pytest
import torch

from attnzoo.tasks.text import text_example
from scripts.caches.budget import Fit, fit_budget
from scripts.caches.metrics import FidelityMeter, kl_divergence
from scripts.caches.models import random_reader
from scripts.caches.retrieval import Score, keep_answered, make_batches, solved_tasks
from scripts.caches.table import parts_claims


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_kl_by_hand():
    full, other = logits(0.5, 0.25, 0.25), logits(0.125, 0.375, 0.5)
    found = kl_divergence(full.view(1, 1, 3), other.view(1, 1, 3))
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(1 / 2))
    assert kl_divergence(full[None, None], full[None, None] + 7.0).item() == pytest.approx(0.0, abs=1e-12)


def test_fidelity_by_hand():
    meter = FidelityMeter()
    same = logits(0.5, 0.25, 0.25).repeat(1, 98, 1)
    meter.add(same, same, torch.zeros(1, 98, dtype=torch.long))
    # Two tokens more: the likeliest differs, the text takes the one that has become less likely.
    full, other = logits(0.5, 0.25, 0.25).repeat(1, 2, 1), logits(0.25, 0.25, 0.5).repeat(1, 2, 1)
    meter.add(full, other, torch.zeros(1, 2, dtype=torch.long))
    found = meter.result()
    moved = 0.25 * math.log(2)
    assert found.kl_mean == pytest.approx(0.02 * moved)
    assert found.kl_p99 == pytest.approx(moved)
    assert found.agreement == pytest.approx(0.98)
    assert found.full_perplexity == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(2.0**0.98 * 4.0**0.02)


def test_a_meter_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens were measured"):
        FidelityMeter().result()


@pytest.mark.parametrize("budget", [99, 100, 149, 1034, 1035, 5000])
def test_the_fit_is_the_largest_ratio_within_the_budget(budget):
    def measure(ratio: float) -> int:
        return 85 + int(ratio * 100) * 10  # steps, and bytes that no ratio removes

    affordable = [ratio for ratio in (n / 64 for n in range(1, 65)) if measure(ratio) <= budget]
    assert fit_budget(measure, budget) == Fit(max(affordable), measure(max(affordable)))


def test_a_budget_below_everything_has_no_fit():
    assert fit_budget(lambda ratio: 10, 9) is None


def test_the_search_measures_few_ratios():
    asked = []
    fit_budget(lambda ratio: asked.append(ratio) or 0, 1)
    assert len(asked) <= 7


def test_accuracy_counts_tasks_and_conditions_alike():
    score = Score({("a", "inside", 0): [True] * 8, ("a", "second", 0): [False] * 2, ("b", "inside", 1): [True, False]})
    assert score.accuracy("a") == 0.5
    assert score.accuracy(condition="inside") == 0.75
    assert score.accuracy() == pytest.approx(0.5)
    assert score.accuracy(seed=1) == 0.5
    assert math.isnan(score.accuracy("c"))


def test_examples_are_kept_that_the_full_cache_answers_everywhere():
    encode = random_reader().encode
    batches = make_batches(lambda task, seed: text_example(encode, task, 300, seed), ["recall", "passkey"], 2, 5, 2)
    score = Score()
    for (task, seed), groups in batches.items():
        for number, _ in enumerate(example for group in groups for example in group):
            for where in ("inside", "outside", "second"):
                wrong = (number == 1 and where == "second") or (task == "passkey" and seed == 1 and number < 4)
                score.right[task, where, seed].append(not wrong)
    kept = keep_answered(batches, score, count=2, batch=3)
    assert set(kept) == {("recall", 0), ("recall", 1)}
    for key, groups in kept.items():
        drawn = [example for group in batches[key] for example in group]
        found = [example for group in groups for example in group]
        assert sorted(map(drawn.index, found)) == [0, 2]


def test_tasks_must_be_solved_under_every_condition():
    where = ("inside", "outside", "second")
    right = {("a", c, 0): [True] for c in where} | {("b", c, 0): [c != "second"] for c in where}
    assert solved_tasks(Score(right), ["a", "b"], 0.9) == ["a"]


def test_a_part_of_d2o_must_bring_it_nearer():
    kl = {("d2o", 0.5): 0.2, ("d2o, half recent", 0.5): 0.3, ("d2o, nothing merged", 0.5): 0.1, ("streaming", 0.5): 0.0}
    rows = [{"policy": policy, "budget": budget, "KL mean": value} for (policy, budget), value in kl.items()]
    assert [claim.holds for claim in parts_claims("parts", rows)] == [True, False]
