"""The recurrent baseline: what it sees, what it learns from, how it is selected, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.gru import Gru, GruConfig, GruNetwork, fit_gru
from attnzoo.clinical.outcome import Outcome
from attnzoo.clinical.splits import Fold, folds
from attnzoo.clinical.statistics import Statistics
from tests.helpers.clinical_data import small_cohort

SMALL = GruConfig(hidden=7, epochs=5, batch_size=11, keep_best=2, lr=0.03)
HOURLY = Outcome(label="los", edges=(2.0, 4.0), hourly=True)


def cohort() -> Cohort:
    """Whose fast hearts die, and are to stay longer; stays of 0 to 6 hours."""
    made = small_cohort(stays=180)
    hours_N = np.arange(180) % 7
    died_N = made.labels["mortality"]
    values_NTV = made.grid.values_NTV.copy()
    values_NTV[..., 0] += 150 * died_N[:, None]
    left_NT = hours_N[:, None] - 1.0 - np.arange(6)
    los_NT = np.where(left_NT >= 0, left_NT * (1 + died_N[:, None]), np.nan).astype(np.float32)
    grid = replace(made.grid, values_NTV=values_NTV, hours_N=hours_N)
    return replace(made, grid=grid, labels={**made.labels, "los": los_NT})


def split(made: Cohort) -> Fold:
    return folds(made, 3, by="stay", label="mortality", validation=0.4)[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_an_hour_sees_neither_later_hours_nor_padding_nor_other_stays(layers: int) -> None:
    torch.manual_seed(0)
    network = GruNetwork(GruConfig(hidden=5, layers=layers), HOURLY, variables=3, statics=2).double().eval()
    cells, statics, hours = torch.randn(4, 7, 3, 4).double(), torch.randn(4, 2).double(), torch.tensor([7, 3, 0, 5])
    whole = network(cells, statics, hours)
    assert (whole.shape, bool(torch.isfinite(whole).all())) == ((4, 7, 2), True)
    assert bool((whole[..., 0] > whole[..., 1]).all())  # P(bucket > k) falls
    for hour in range(1, 6):
        changed = cells.clone()
        changed[:, hour:] = 9.0
        assert torch.equal(network(changed, statics, hours)[:, :hour], whole[:, :hour])
        cut = network(cells[:, :hour], statics, hours.clamp(max=hour))
        real = torch.arange(hour) < hours[:, None]
        torch.testing.assert_close(cut[real], whole[:, :hour][real], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(cells[1:2], statics[1:2], hours[1:2])[0, :3], whole[1, :3])
    stay = GruNetwork(GruConfig(hidden=5, layers=layers), Outcome(), variables=3, statics=2).double().eval()
    stay.load_state_dict({**network.state_dict(), **{k: v for k, v in stay.state_dict().items() if "head" in k}}, False)
    beyond = cells.clone()
    beyond[1, 3:], beyond[2] = 9.0, 9.0
    assert torch.equal(stay(beyond, statics, hours), stay(cells, statics, hours))
    assert not torch.equal(stay(cells[:1], statics[:1], hours[:1] - 1), stay(cells[:1], statics[:1], hours[:1]))


@pytest.mark.parametrize("outcome", [Outcome(), HOURLY, replace(HOURLY, head="linear")], ids=["yes/no", "rise", "each"])
def test_it_learns_from_training_rows_and_selects_on_validation_rows(outcome: Outcome) -> None:
    made, ticks = cohort(), []
    fold = split(made)
    model = fit_gru(made, outcome, fold, SMALL, seed=3, tick=lambda: ticks.append(1))
    assert len(ticks) == len(model.scores) == 5
    known = fold.train[made.grid.hours_N[fold.train] > 0] if outcome.hourly else fold.train
    assert model.statistics == Statistics.fit(made, known)
    assert model.outcome.centers == outcome.fitted(outcome.labels(made, fold.train)).centers

    again = replace(made, labels={name: each.copy() for name, each in made.labels.items()})
    again.grid.values_NTV[fold.test], again.labels[outcome.label][fold.test] = 1e4, 1.0
    assert weights(fit_gru(again, outcome, fold, SMALL, seed=3)) == weights(model)
    assert weights(fit_gru(made, outcome, fold, SMALL, seed=4)) != weights(model)

    found = model.predict(made, fold.validation)
    assert found.shape[:1] == (len(fold.validation),)
    assert np.isfinite(found).all()
    assert not outcome.edges or found.sum(-1) == pytest.approx(1.0)
    labels, logits = outcome.labels(made, fold.validation), model.logits(made, fold.validation)
    told = model.outcome.metrics(torch.from_numpy(labels), torch.from_numpy(logits))
    assert tuple(told) == model.outcome.metric_names
    assert model.outcome.score(told) > (0.2 if outcome.edges else 1.2)  # chance: 0, and .7


def weights(model: Gru) -> list[list[float]]:
    return [each.flatten().tolist() for each in model.network.state_dict().values()]


def test_the_mean_of_the_best_epochs_is_kept() -> None:
    made = cohort()
    fold = split(made)
    labels = torch.from_numpy(Outcome().labels(made, fold.validation))
    one, two, all_ = (fit_gru(made, Outcome(), fold, replace(SMALL, keep_best=keep)) for keep in (1, 2, 9))
    assert one.scores == two.scores == all_.scores
    ranked = sorted(one.scores, reverse=True)
    assert ranked[0] > ranked[1] > ranked[-1]

    def score(model: Gru) -> float:
        return Outcome().score(Outcome().metrics(labels, torch.from_numpy(model.logits(made, fold.validation))))

    assert score(one) == ranked[0]
    best, mean = one.network.state_dict(), two.network.state_dict()
    two.network.load_state_dict({name: 2 * mean[name] - best[name] for name in mean})  # the second best
    assert score(two) == pytest.approx(ranked[1], abs=1e-6)
    assert weights(all_) != weights(one)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden": 0}, "hidden=0 must be at least 1"),
        ({"keep_best": 0}, "keep_best=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"epochs": 2.5}, "epochs=2.5"),
    ],
)
def test_refused_options(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GruConfig(**values)


def test_refused_cohorts() -> None:
    made = cohort()
    fold = split(made)
    dead = np.flatnonzero(made.labels["mortality"] == 1)
    with pytest.raises(ValueError, match="the train part of 36 stays has no 'mortality' of both kinds"):
        fit_gru(made, Outcome(), replace(fold, train=dead), SMALL)
    with pytest.raises(ValueError, match="the validation part of 0 stays has no 'los'; give more stays"):
        fit_gru(made, HOURLY, replace(fold, validation=np.flatnonzero(made.grid.hours_N == 0)), SMALL)
    with pytest.raises(ValueError, match=r"no epoch could be scored on .* validation stays; lower lr=1e"):
        fit_gru(made, Outcome(), fold, replace(SMALL, lr=1e38, clipping=1e38))
