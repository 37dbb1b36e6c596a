"""Explanations of predictions for patients: planted signals are found, sums are complete, what is measured of a map
equals a loop by hand, and a map that knows nothing of the model is called that."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from attnzoo.clinical.explain import (
    CellMap,
    Logit,
    StayCells,
    attention,
    by_chance,
    findings,
    integrated_gradients,
    occlusion,
)
from attnzoo.clinical.faithfulness import (
    PATH,
    SHARES,
    faithfulness,
    randomisation_check,
    rank_correlation,
    ranks,
    removal,
    stability,
)
from attnzoo.models import EhrConfig, EhrEncoder
from attnzoo.models.ehr_cells import MEASURED, VALUE, gaps

V, T, S = 7, 12, 2
SMALL = {"variables": V, "statics": S, "model_dim": 8, "num_heads": 2, "mlp_dim": 11, "chunks": 3, "chunk_hours": 4}
OPTIONS = {
    "paper": {},
    "official": {"flavor": "official", "summary": "none"},
    "temporal, ordinal": {"branches": "temporal", "head": "ordinal", "outputs": 3, "summary": "mlp"},
    "spatial": {"branches": "spatial", "outputs": 3},
    "hourly": {"hourly": True, "outputs": 3},
}
PLANTED = torch.zeros(T, V, dtype=torch.bool)
PLANTED[5:10, [1, 3]] = True


def stays(number: int = 6, *, share: float = 0.4, hours: torch.Tensor | None = None, seed: int = 1) -> StayCells:
    """Random stays in float64 of which this share of cells is measured, no value being near 0; hours that do not exist
    hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    count = torch.randint(1, 4, (number, T, V), generator=generator).double()
    count *= torch.rand(number, T, V, **draw) < share
    measured = (count > 0).double()
    value = torch.randn(number, T, V, **draw)
    value = (value + 0.5 * value.sign()) * measured
    cells = torch.stack([value, measured, count.log1p(), gaps(measured)], dim=-1)
    hours = torch.full((number,), T) if hours is None else hours
    gone = torch.arange(T) >= hours[:, None]
    return StayCells(cells.masked_fill(gone[..., None, None], torch.nan), torch.randn(number, S, **draw), hours)


def encoder(**options) -> EhrEncoder:
    built = EhrEncoder(EhrConfig(**(SMALL | options))).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return built


class Known(nn.Module):
    """A linear function of planted cells alone: of their values, or of whether they were measured."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(T, V, 4, dtype=torch.float64))
        with torch.no_grad():
            self.weight[..., channel] = PLANTED * torch.linspace(0.5, 2.0, T, dtype=torch.float64)[:, None]

    def forward(self, cells_NTVC, statics_NS, hours_N):
        return torch.einsum("ntvc,tvc->n", cells_NTVC, self.weight)[:, None]


def trained(channel: int) -> EhrEncoder:
    """An encoder that learns a risk that depends on the planted cells alone: on their values, or on how many of them
    were measured."""
    torch.manual_seed(0)
    config = SMALL | {"summary": "none", "chunks": 2, "chunk_hours": 6, "model_dim": 16, "mlp_dim": 32, "dropout": 0.0}
    model = EhrEncoder(EhrConfig(**config, hide_variables=0.0, hide_hours=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    seen = stays(4096, share=0.7, seed=7)
    cells, statics = seen.cells_NTVC.float(), seen.statics_NS.float()
    evidence = (cells[..., channel] * PLANTED).sum((1, 2))
    risk = (evidence - evidence.mean()).sigmoid()
    for step in range(160):
        rows = torch.arange(step * 128, step * 128 + 128) % len(seen)
        logits = model(cells[rows], statics[rows], seen.hours_N[rows])[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, risk[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double().eval()


def planted_share(cell_map: CellMap, seen: StayCells) -> float:
    """Of the five largest cells of stays that have as many planted ones measured."""
    some = (seen.observed & PLANTED).sum((1, 2)) >= 5
    top = ranks(cell_map.values_NTV.abs(), seen.observed)[some] < 5
    assert some.sum() >= 5, "too few stays have the planted cells"
    return float((top & PLANTED).sum() / top.sum())


@pytest.mark.parametrize("channel", [VALUE, MEASURED], ids=["values decide", "missingness decides"])
def test_planted_signals_of_a_known_function(channel):
    """Integrated gradients of a linear function are its terms, and so is occlusion; chance and |z| find nothing."""
    seen, model = stays(40, share=0.7), Known(channel).eval()
    logit = Logit(model)
    gradients, hidden = integrated_gradients(logit, seen), occlusion(logit, seen)
    terms = (seen.cells_NTVC * model.weight.detach()).sum(-1)
    for found in (gradients, hidden):
        torch.testing.assert_close(found.values_NTV, terms, rtol=0, atol=1e-9)
        assert planted_share(found, seen) == 1.0
    assert planted_share(by_chance(seen, 0), seen) < 0.5
    found = faithfulness(logit, seen, [gradients, CellMap("attention", by_chance(seen, 9).values_NTV, signed=False)])
    assert list(found) == ["integrated gradients", "attention", "|z|", "random"]
    assert found["integrated gradients"].beats_random
    assert found["integrated gradients"].difference > found["random"].difference
    assert found["integrated gradients"].preservation < 0.1 * found["random"].preservation
    for name in ("attention", "random"):
        assert not found[name].beats_random
        assert found[name].words.startswith(f"{name} is not shown to be better than random cells")
    rho = randomisation_check(lambda m: integrated_gradients(Logit(m), seen), model, seen)
    assert abs(rho) < 0.3


@pytest.mark.parametrize("channel", [VALUE, MEASURED], ids=["values decide", "missingness decides"])
def test_planted_signals_of_a_trained_encoder(channel):
    model, seen = trained(channel), stays(32, share=0.7, seed=3)
    logit = Logit(model)
    gradients = integrated_gradients(logit, seen)
    assert planted_share(gradients, seen) >= 0.8
    assert planted_share(occlusion(logit, seen), seen) >= 0.8
    assert faithfulness(logit, seen, [gradients])["integrated gradients"].beats_random
    few = seen.rows(slice(12))
    rho = randomisation_check(lambda m: integrated_gradients(Logit(m), few, tolerance=0.2), model, few)
    assert abs(rho) < 0.3, "the map stays the same without what was learned"


@pytest.mark.parametrize("name", OPTIONS)
def test_attributions_are_complete(name):
    """Unequal stays: the sum is the difference of logits to the stay without measurements, and unmeasured cells have
    0. Every cell alone is compared with a sum over the path's points, one stay and one cell's channels at a time."""
    model, seen = encoder(**OPTIONS[name]), stays(5, hours=torch.tensor([12, 7, 4, 1, 11]))
    logit = Logit(model, output=model.config.outputs - 1)
    found = integrated_gradients(logit, seen, tolerance=0.01).values_NTV
    empty = torch.zeros_like(seen.cells_NTVC)
    empty[..., 3] = 1.0
    difference = logit.without(seen) - logit.of(seen, empty).detach()
    torch.testing.assert_close(found.sum((1, 2)), difference, rtol=0.01, atol=0.01)
    assert not found[~seen.observed].any()
    assert bool((found[seen.observed] != 0).float().mean() > 0.9)
    one = seen.rows(slice(1))
    whole = float(logit.without(one))
    hidden = occlusion(logit, one).values_NTV[0]
    for hour, variable in seen.observed[0].nonzero()[:6].tolist():
        cells = one.cells_NTVC.clone()
        cells[0, hour, variable, :3] = 0.0
        cells[..., 3] = gaps(cells[..., 1])
        assert math.isclose(hidden[hour, variable], whole - float(logit.of(one, cells).detach()), abs_tol=1e-9)


def test_the_time_since_a_measurement_belongs_to_it():
    """A model of the gaps alone: each has an attribution in the cell that ended it, until the next one."""
    cells = torch.zeros(1, T, V, 4, dtype=torch.float64)
    cells[0, [2, 6], 0, :3] = 1.0
    cells[..., 3] = gaps(cells[..., 1])
    seen = StayCells(cells, torch.zeros(1, S), torch.tensor([T]))
    found = integrated_gradients(Logit(lambda cells, *_: cells[..., 3].sum((1, 2))[:, None]), seen).values_NTV[0]
    gap = cells[0, :, 0, 3]
    assert math.isclose(found[2, 0], float((gap[2:6] - 1).sum()))
    assert math.isclose(found[6, 0], float((gap[6:] - 1).sum()))
    assert int((found != 0).sum()) == 2


@pytest.mark.parametrize("signed", [True, False])
def test_removal_equals_a_loop_by_hand(signed):
    model, seen = encoder(), stays(4, hours=torch.tensor([12, 9, 5, 0]))
    logit = Logit(model)
    values = torch.randn(4, T, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    values = (values if signed else values.abs()) * seen.observed
    found = removal(logit, seen, CellMap("any", values, signed=signed))

    def score(row: int, gone: list) -> float:
        cells = seen.cells_NTVC[row : row + 1].clone()
        for hour, variable in gone:
            cells[0, hour, variable, :3] = 0.0
        cells[..., 3] = gaps(cells[..., 1])
        with torch.no_grad():
            return float(model(cells, seen.statics_NS[row : row + 1], seen.hours_N[row : row + 1]))

    for row in range(4):
        places = [tuple(place) for place in seen.observed[row].nonzero().tolist()]
        whole, nothing = score(row, []), score(row, places)
        direction = (whole > nothing) - (whole < nothing)
        by_support = sorted(places, key=lambda at: -values[row][at] * (direction if signed else 1))
        for k, share in enumerate(SHARES):
            number = math.ceil(share * len(places) - 1e-6)
            gone, kept = score(row, by_support[:number]), score(row, by_support[number:])
            assert math.isclose(found.comprehensiveness_NK[row, k], direction * (whole - gone), abs_tol=1e-9)
            assert math.isclose(found.sufficiency_NK[row, k], direction * (whole - kept), abs_tol=1e-9)
        by_size = sorted(places, key=lambda at: -abs(values[row][at]))
        for actual, order in ((found.difference_N, by_size), (found.preservation_N, by_size[::-1])):
            path = [score(row, order[: math.ceil(share * len(places) - 1e-6)]) for share in PATH]
            expected = sum(abs(b - a) for a, b in itertools.pairwise(path))
            assert math.isclose(actual[row], expected, abs_tol=1e-9)


@pytest.mark.parametrize("branches", ["both", "temporal", "spatial"])
def test_attention_is_followed_through_all_chunks(branches):
    """Against matrices built forward from the first chunk, one stay at a time."""
    model, hours = encoder(branches=branches), (12, 7, 3)
    seen = stays(3, hours=torch.tensor(hours))
    found = attention(model, seen)
    maps = model.read_maps(seen.cells_NTVC, seen.statics_NS, seen.hours_N)
    assert not found.signed
    for row, length in enumerate(hours):
        weights = np.ones((T, V))
        for branch, pooled in (("temporal", maps.hours_NT), ("spatial", maps.variables_NV)):
            if pooled is None:
                continue
            size = pooled.shape[1] + 1
            last = (length - 1) // 4
            onto = np.zeros((size, 0))  # from the tokens of all chunks so far to those of the present one
            for chunk in range(last + 1):
                own = maps.maps[f"{branch}.{chunk}.self"][row].mean(0).double().numpy()
                new = (np.eye(size) + own) / 2
                if chunk:
                    cross = maps.maps[f"{branch}.{chunk}.cross"][row].mean(0).double().numpy()
                    new, onto = new / 2, cross @ onto / 2
                onto = np.concatenate([onto, new], axis=1)
            flow = (np.append(0.0, pooled[row].numpy()) @ onto).reshape(last + 1, size)[:, 1:]
            if branch == "temporal":
                per_hour = np.append(flow.ravel(), np.zeros(T - flow.size))
                of_cells = np.repeat(per_hour[:, None], V, 1)
            else:
                of_cells = np.repeat(np.concatenate([flow, np.zeros((2 - last, V))]), 4, axis=0)
            if branches != "both":  # shared by the measured cells
                observed = seen.observed[row].numpy()
                parts = (
                    [[slice(t, t + 1)] for t in range(T)]
                    if branch == "temporal"
                    else [[slice(c, c + 4)] for c in (0, 4, 8)]
                )
                for (part,) in parts:
                    number = observed[part].sum() if branch == "temporal" else observed[part].sum(0)
                    of_cells[part] = of_cells[part] / np.maximum(number, 1)
            weights = weights * of_cells
        weights = weights * seen.observed[row].numpy()
        np.testing.assert_allclose(found.values_NTV[row].numpy(), weights / weights.sum(), atol=1e-6)


def test_rank_correlation_and_stability():
    """Ties share their mean rank; one stay has no order."""
    seen = stays(4, hours=torch.tensor([12, 5, 2, 0]))
    one, two = (
        torch.randint(0, 5, seen.observed.shape, generator=torch.Generator().manual_seed(s)).double() for s in (5, 6)
    )
    found = rank_correlation(one, two, seen.observed)
    for row in range(3):
        pair = [x[row][seen.observed[row]].numpy() for x in (one, two)]
        places = [[(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x] for x in pair]
        assert math.isclose(found[row], np.corrcoef(*places)[0, 1], abs_tol=1e-12)
    assert bool(found[3].isnan())
    maps = [CellMap("any", x, signed=True) for x in (one, two, one)]
    expected = (2 * found[:3].mean() + 1) / 3
    assert math.isclose(stability(maps, seen), expected, abs_tol=1e-12)


def test_findings_say_what_they_are():
    cells = torch.zeros(1, T, V, 4, dtype=torch.float64)
    cells[0, 2, 0, :3] = cells[0, [1, 4, 9], 5, :3] = 1.0
    cells[..., 3] = gaps(cells[..., 1])
    seen = StayCells(cells, torch.zeros(1, S), torch.tensor([T]))
    values = torch.zeros(1, T, V)
    values[0, 2, 0], values[0, 4, 5], values[0, 9, 5] = -0.5, 2.0, -0.25
    names = ["lactate", "b", "c", "d", "e", "urine", "g"]
    signed, looked = (
        CellMap("integrated gradients", values, signed=True),
        CellMap("attention", values.abs(), signed=False),
    )
    assert [finding.words for finding in findings(signed, seen, 0, names)] == [
        "urine (3 hours from 1 to 9) raises the model's logit by 1.75 (integrated gradients).",
        "lactate (hour 2) lowers the model's logit by 0.50 (integrated gradients).",
    ]
    assert [finding.words for finding in findings(looked, seen, 0, names, most=1)] == [
        "82% of the attention lies on urine (3 hours from 1 to 9)."
    ]


def test_what_cannot_be_explained_is_refused():
    seen, model = stays(3), encoder()
    cells = seen.cells_NTVC.clone()
    cells[1, 2, 3] = torch.tensor([0.5, 0.0, 0.0, 1.0])

    def kinked(cells_NTVC, *_):
        return (cells_NTVC[..., 0].abs().sum((1, 2)) - 5).clamp(min=0)[:, None]

    attempts = [
        (lambda: StayCells(cells, seen.statics_NS, seen.hours_N), r"cells_NTVC\[1, 2, 3, 0\] is 0.5.*Statistics.cells"),
        (lambda: StayCells(cells[..., :3], seen.statics_NS, seen.hours_N), r"cells_NTVC has shape \[3, 12, 7, 3\]"),
        (lambda: StayCells(seen.cells_NTVC, seen.statics_NS, seen.hours_N[:2]), "hours_N has 2 rows"),
        (lambda: Logit(encoder().train()), "model is in training mode.*eval"),
        (lambda: attention(encoder().train(), seen), "encoder is in training mode"),
        (lambda: attention(encoder(hourly=True), seen), "hourly=True.*integrated_gradients"),
        (lambda: occlusion(Logit(model, output=1), seen), "output=1 does not exist"),
        (lambda: occlusion(Logit(model, hour=3), seen), "hour=3.*leave hour out"),
        (lambda: occlusion(Logit(encoder(hourly=True), hour=12), seen), "hour=12 does not exist"),
        (lambda: integrated_gradients(Logit(kinked), seen, tolerance=0.0), "tolerance=0.0.*512 points"),
        (lambda: faithfulness(Logit(model), seen, [by_chance(seen, 0)]), "named .'random'.*added here"),
        (lambda: faithfulness(Logit(model), seen, [], draws=0), "draws=0"),
        (lambda: removal(Logit(model), seen, CellMap("x", torch.zeros(3, T, 2), signed=True)), "x has shape"),
        (lambda: removal(Logit(model), seen, CellMap("x", cells[..., 0] / 0, signed=True)), "x holds.*not finite"),
        (lambda: stability([by_chance(seen, 0)], seen), "at least 2"),
        (lambda: findings(by_chance(seen, 0), seen, 3, ["a"] * V), "row=3 does not exist"),
        (lambda: findings(by_chance(seen, 0), seen, 0, ["a"]), "variables has 1 names"),
    ]
    for attempt, message in attempts:
        with pytest.raises(ValueError, match=message):
            attempt()
