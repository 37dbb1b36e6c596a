"""The clinical encoder: its formula by hand, padding, streaming by hour, maps, what an hour may see, pretraining."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from attnzoo.attention.edits import Edits, Hide, Where
from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid
from attnzoo.clinical.statistics import Statistics
from attnzoo.models import EhrConfig, EhrEncoder, EhrPretraining
from attnzoo.models.ehr_cells import COUNT, GAP, MEASURED, SUMMARY, VALUE, gaps, hide_cells, summarise
from attnzoo.models.shapes import without_storage
from tests.helpers import ehr_oracle

V, S, H = 7, 3, 5
SMALL = {"variables": V, "statics": S, "model_dim": 6, "num_heads": 2, "mlp_dim": 11, "chunks": 3, "chunk_hours": H}
HOURS = torch.tensor([13, 5, 15, 2, 0, 10])
OPTIONS = {
    "paper": {},
    "official": {"flavor": "official", "summary": "none"},
    "temporal, ordinal": {"branches": "temporal", "head": "ordinal", "outputs": 4},
    "spatial, odd": {"branches": "spatial", "clock": True, "model_dim": 9, "num_heads": 3, "outputs": 2},
    "mean": {"combine": "mean", "outputs": 2},
    "mean, ordinal": {"combine": "mean", "branches": "spatial", "head": "ordinal", "outputs": 3, "summary": "none"},
    "hourly, mean": {"hourly": True, "combine": "mean", "outputs": 2},
    "hourly": {"hourly": True, "outputs": 2},
    "hourly, official": {"hourly": True, "flavor": "official", "clock": True},
    "hourly, spatial": {"hourly": True, "branches": "spatial", "head": "ordinal", "outputs": 3},
}


def model(seed: int = 0, **options) -> EhrEncoder:
    """Every parameter random, float64, as in evaluation."""
    built = EhrEncoder(EhrConfig(**(SMALL | options))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return built


def cells(stays: int, hours: int, variables: int = V, seed: int = 1) -> torch.Tensor:
    """Two of five cells measured, up to three times an hour."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 4, (stays, hours, variables), generator=generator).double()
    count *= torch.rand(stays, hours, variables, generator=generator) < 0.4
    measured = (count > 0).double()
    value = torch.randn(stays, hours, variables, generator=generator).double() * measured
    return torch.stack([value, measured, count.log1p(), gaps(measured)], dim=-1)


CELLS = cells(len(HOURS), 15)
STATICS = torch.randn(len(HOURS), S, generator=torch.Generator().manual_seed(2)).double()


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def weights_of(encoder: EhrEncoder) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_formula_by_hand(name):
    """Both flavours in float64 against loops in numpy; what stands behind a stay's hours is NaN."""
    encoder = model(**OPTIONS[name])
    gone = torch.arange(15) >= HOURS[:, None]
    with torch.no_grad():
        found = encoder(CELLS.masked_fill(gone[..., None, None], torch.nan), STATICS, HOURS)
    formula = ehr_oracle.hourly_logits if encoder.config.hourly else ehr_oracle.logits
    for row, hours in enumerate(HOURS.tolist()):
        expected = formula(encoder.config, weights_of(encoder), CELLS[row].numpy(), STATICS[row].numpy(), hours)
        if expected.size:
            close(found[row, :hours] if encoder.config.hourly else found[row], expected)
    assert name != "temporal, ordinal" or bool((found.diff(dim=-1) < 0).all()), "P(bucket > k) does not fall with k"


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_changes_nothing(name):
    """More hours (more than the chunks hold, too), more stays in the batch, and variables that do not exist."""
    encoder = model(**OPTIONS[name])
    with torch.no_grad():
        found = encoder(CELLS, STATICS, HOURS)
        gone = torch.arange(15) >= HOURS[:, None]
        longer = CELLS.masked_fill(gone[..., None, None], torch.nan)
        longer = torch.cat([longer, torch.full((len(HOURS), 9, V, 4), torch.nan).double()], dim=1)
        for row, hours in enumerate(HOURS.tolist()):
            kept = (row, slice(hours)) if encoder.config.hourly else row
            close(encoder(longer, STATICS, HOURS)[kept], found[kept])
            alone = encoder(CELLS[row : row + 1, :hours], STATICS[row : row + 1], HOURS[row : row + 1])
            close(alone[0], found[kept])
        wider = model(1, **(OPTIONS[name] | {"variables": V + 2}))
        theirs = wider.state_dict()
        for key, tensor in encoder.state_dict().items():
            if theirs[key].shape == tensor.shape:
                theirs[key] = tensor
            elif key == "summary.weight":  # features of variables, then statics
                theirs[key] = torch.cat(
                    [tensor[:, :-S], theirs[key][:, -S - 2 * len(SUMMARY) : -S], tensor[:, -S:]], dim=1
                )
            else:
                theirs[key] = torch.cat([tensor, theirs[key][V:]])
        wider.load_state_dict(theirs)
        more = torch.cat([CELLS, torch.full((len(HOURS), 15, 2, 4), torch.nan).double()], dim=2)
        exist = (torch.arange(V + 2) < V).expand(len(HOURS), -1)
        for row, hours in enumerate(HOURS.tolist()):
            kept = (row, slice(hours)) if encoder.config.hourly else row
            close(wider(more, STATICS, HOURS, variables_NV=exist)[kept], found[kept])


@pytest.mark.parametrize("name", OPTIONS)
def test_stays_without_a_measurement_are_finite(name):
    encoder = model(**OPTIONS[name]).train()
    nothing = torch.zeros(2, 15, V, 4, dtype=torch.float64, requires_grad=True)
    out = encoder(nothing, STATICS[:2], torch.tensor([15, 0]))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (nothing, *encoder.parameters()))


@pytest.mark.parametrize("name", [*OPTIONS, "long"])
def test_streaming_by_hour(name):
    """Unequal stays in chunks of any number of hours, rows at different places: after every hour the logits are those
    of the stay up to it, and at the ends of chunks the state holds the whole window's z."""
    long = {"share_fusion": True, "chunks": 2} if name == "long" else OPTIONS[name]
    encoder, taken, found = model(**long), torch.zeros(len(HOURS), dtype=torch.int64), [[] for _ in HOURS]
    with torch.no_grad():
        state = encoder.init_state(STATICS)
        assert not any(x.any() for key, x in state.tensors().items() if key not in ("statics_NS", "exist_NV"))
        while bool((taken < HOURS).any()):
            counts = torch.minimum(torch.tensor([1, 2, 3, 1, 1, 4]), HOURS - taken)
            chunk = torch.full((len(HOURS), 4, V, 4), torch.nan).double()
            for row, count in enumerate(counts.tolist()):
                chunk[row, :count] = CELLS[row, taken[row] : taken[row] + count]
            logits, state = encoder.extend(chunk, state, counts)
            taken += counts
            for row, count in enumerate(counts.tolist()):
                found[row] += list(logits[row, :count])
        for row, hours in enumerate(HOURS.tolist()):
            whole = (CELLS[row : row + 1], STATICS[row : row + 1])
            for hour in range(1, hours + 1):
                expected = encoder(*whole, torch.tensor([hour]))[0]
                close(found[row][hour - 1], expected[hour - 1] if encoder.config.hourly else expected)
            for branch in encoder.branches if hours >= H else ():
                z = ehr_oracle.encoded(
                    encoder.config, weights_of(encoder), branch, *(x[0].numpy() for x in whole), hours
                )
                close(getattr(state, f"{branch}_NTD")[row], z[0][hours // H - 1])
    with pytest.raises(ValueError, match="share_fusion=True") if name != "long" else nullcontext():
        encoder.extend(CELLS[:, :3], state)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "hourly" in name])
def test_an_hour_sees_nothing_after_it(name):
    """Changing an hour changes no logits before it, exactly, and its own (the spatial branch alone waits for the end of
    its chunk, and the summary does not)."""
    encoder, hours = model(**OPTIONS[name]), torch.tensor([15])
    with torch.no_grad():
        before = encoder(CELLS[:1], STATICS[:1], hours)
        assert before.shape == (1, 15, encoder.config.outputs)
        for hour in range(15):
            changed = CELLS[:1].clone()
            changed[:, hour] += 1.0
            difference = (encoder(changed, STATICS[:1], hours) - before).abs().amax((0, 2))
            assert difference[:hour].sum() == 0.0
            assert difference[hour] > 0.0


@pytest.mark.parametrize("flavor", ["paper", "official"])
def test_maps(flavor):
    """Weights that are read are those of the formula; what is hidden by an edit has none, and moves the answer."""
    encoder, rows = model(flavor=flavor), slice(0, 3)
    read = encoder.read_maps(CELLS[rows], STATICS[rows], HOURS[rows])
    assert read.maps.keys() == encoder.attentions().keys()
    assert len(read.maps) == 2 * (1 + 2 * 2)
    for row, hours in enumerate(HOURS[rows].tolist()):
        for branch, shown in (("temporal", read.hours_NT), ("spatial", read.variables_NV)):
            zs, exists, maps = ehr_oracle.encoded(
                encoder.config, weights_of(encoder), branch, CELLS[row].numpy(), STATICS[row].numpy(), hours
            )
            for name, expected in maps.items():
                close(read.maps[name][row].double(), expected, 1e-6)
            close(shown[row], ehr_oracle.pooled(weights_of(encoder), branch, zs[-1], exists[-1])[1])
    edits = Edits(Hide(Where(keys=(2,))))
    with torch.no_grad():
        plain = encoder(CELLS[rows], STATICS[rows], HOURS[rows])
        hidden = {"spatial.1.cross": encoder.plan_edits(edits, 3)["spatial.1.cross"]}
        assert (encoder(CELLS[rows], STATICS[rows], HOURS[rows], edits=hidden) - plain)[0].abs() > 1e-6


def test_summary_and_hidden_cells():
    """Of every hour, at once, after the last alone, and continued from an hour before, where some variables have not
    been measured yet; a hidden cell leaves no trace in later gaps."""
    given = CELLS.clone()
    given[0, :9, 2:4], given[1, 2:, 5], given[1, :, 6] = 0.0, 0.0, 0.0  # late, early, and never
    given = hide_cells(given, given[..., MEASURED] <= 0)
    hours = torch.arange(1, 16).expand(len(given), -1)
    found = summarise(given)
    of_hours = found.features(hours, given[..., GAP])
    whole = summarise(given, each_hour=False).at(0)
    close(whole.features(hours[:, -1], given[:, -1, :, GAP]), of_hours[:, -1])
    first = summarise(given[:, :4]).at(-1)
    later = summarise(given[:, 4:], first, torch.full((len(given),), 4)).features(hours[:, 4:], given[:, 4:, :, GAP])
    for row in range(2):
        for hour in range(15):
            expected = ehr_oracle.summary(given[row, : hour + 1].numpy())
            close(of_hours[row, hour], expected)
            if hour >= 4:
                close(later[row, hour - 4], expected)
    hidden = torch.rand(CELLS.shape[:3], generator=torch.Generator().manual_seed(3)) < 0.5
    kept = hide_cells(CELLS, hidden)
    assert not kept[..., :GAP][hidden].any()
    assert torch.equal(kept[..., :GAP][~hidden], CELLS[..., :GAP][~hidden])
    seen = (CELLS[..., MEASURED] > 0) & ~hidden
    for row, hour, variable in [(0, 14, 3), (1, 7, 0), (2, 0, 1), (3, 11, 6)]:
        times = [t for t in range(hour + 1) if seen[row, t, variable]]
        close(kept[row, hour, variable, GAP], (hour - times[-1]) / 48 if times else 1.0)
    assert gaps(torch.cat([torch.ones(1, 1, 1), torch.zeros(1, 60, 1)], dim=1))[0, -1, 0] == 1.0


def test_gaps_are_those_of_the_statistics():
    """Cells as training data has them, and as they are once none of them is hidden."""
    count = CELLS[..., COUNT].expm1().round().numpy()
    values = np.where(count > 0, CELLS[..., VALUE].numpy(), np.nan).astype(np.float32)
    names = tuple(f"v{number}" for number in range(V))
    grid = Grid(values, count.astype(np.uint8), np.full(len(HOURS), 15), names)
    ids = tuple(map(str, range(len(HOURS))))
    cohort = Cohort("small", grid, np.zeros((len(HOURS), 0), np.float32), (), ids, ids, {})
    made = torch.from_numpy(Statistics.fit(cohort, np.arange(len(HOURS))).cells(grid))
    assert made.shape == CELLS.shape
    close(hide_cells(made, torch.zeros(made.shape[:3], dtype=torch.bool)), made, 1e-6)
    close(made[..., MEASURED:], CELLS[..., MEASURED:], 1e-6)


def test_cells_are_hidden_in_training_alone():
    encoder = model(dropout=0.0, hide_variables=0.5, hide_hours=0.5)
    first, second = (encoder.train()(CELLS, STATICS, HOURS) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(encoder.eval()(CELLS, STATICS, HOURS), encoder(CELLS, STATICS, HOURS))
    still = model(dropout=0.0, hide_variables=0.0, hide_hours=0.0)
    close(still.train()(CELLS, STATICS, HOURS), encoder(CELLS, STATICS, HOURS))


@pytest.mark.parametrize("branches", ["both", "temporal", "spatial"])
def test_pretraining(branches):
    """What is told of hidden cells does not depend on them; each head tells the cells of its tokens; the loss counts
    hidden cells of hours that exist, and falls."""
    encoder = model(branches=branches)
    task = EhrPretraining(encoder).double()
    hidden = task.hidden(CELLS, torch.Generator().manual_seed(4))
    assert 0.2 < hidden.double().mean() < 0.7
    changed = torch.where(hidden[..., None], cells(len(CELLS), 15, seed=9), CELLS)
    with torch.no_grad():
        told = task(hide_cells(CELLS, hidden), STATICS, HOURS)
        assert torch.equal(told, task(hide_cells(changed, hidden), STATICS, HOURS))
        zs = encoder.encode(CELLS, STATICS, HOURS)
        by_hand = torch.zeros(1, dtype=torch.float64)
        for name, row in (("temporal", (2, 1, 1 + 3)), ("spatial", (2, 1, 1 + 6))):  # hour 8, variable 6
            if name in zs:
                of_token = task.heads[name](zs[name][row]).view(-1, 2)
                by_hand = by_hand + of_token[6 if name == "temporal" else 3]
        close(task(CELLS, STATICS, HOURS)[2, 8, 6], by_hand)
    gone = torch.arange(15) >= HOURS[:, None]
    with torch.no_grad():
        asked = task.hidden(CELLS, torch.Generator().manual_seed(5)) & ~gone[..., None]
        told = task(hide_cells(CELLS, asked), STATICS, HOURS)
        values = [(told[at][0] - CELLS[at][VALUE]) ** 2 for at in map(tuple, asked.nonzero()) if CELLS[at][MEASURED]]
        chance = told[..., 1][asked].sigmoid()
        missed = -torch.where(CELLS[..., MEASURED][asked] > 0, chance, 1 - chance).log().mean()
        expected = torch.stack(values).mean() + 0.2 * missed
        close(task.loss(CELLS, STATICS, HOURS, torch.Generator().manual_seed(5)), expected)
    losses = []
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    filled = CELLS.masked_fill(gone[..., None, None], torch.nan)
    for step in range(8):
        loss = task.loss(CELLS, STATICS, HOURS, torch.Generator().manual_seed(5))
        assert step or torch.equal(task.loss(filled, STATICS, HOURS, torch.Generator().manual_seed(5)), loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        p.grad is not None for name, p in encoder.named_parameters() if ".query" not in name and "branch" in name
    )


def test_every_parameter_has_a_part():
    """Gradients reach every parameter, in both flavours, from one batch."""
    for options in ({}, {"flavor": "official"}, {"combine": "mean"}):
        encoder = model(head="ordinal", outputs=3, **options).train()
        encoder(CELLS, STATICS, HOURS).square().sum().backward()
        idle = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
        assert not idle, f"{options}: no gradient for {idle}"


@pytest.mark.parametrize("hourly", [False, True])
def test_parts_learn_apart(hourly):
    """With combine="mean" the loss of a part has gradients for that part alone, and what is told is half the mean of
    the branches and half the summary head; else there is one part."""
    encoder = model(combine="mean", hourly=hourly, outputs=2)
    parts = encoder(CELLS, STATICS, HOURS, each_part=True)
    told = encoder(CELLS, STATICS, HOURS)
    close((parts[0] + parts[1]) / 4 + parts[2] / 2, told)
    for own, part in zip(("temporal", "spatial", "summary"), parts, strict=True):
        encoder.zero_grad()
        part.square().sum().backward(retain_graph=True)
        moved = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved
        assert all(own in name.split(".") for name in moved), f"{own}: {moved}"
    whole = model(hourly=hourly)
    close(whole(CELLS, STATICS, HOURS, each_part=True), whole(CELLS, STATICS, HOURS)[None])


def test_configuration():
    config = EhrConfig(**SMALL, attention={"kind": "mha", "position": "none", "qkv_bias": True})
    assert EhrConfig.from_dict(config.to_dict()) == config
    assert config.self_attention()[1]["num_heads"] == 2
    with without_storage():
        shapes = EhrEncoder(config).state_dict()
    assert {n: x.shape for n, x in shapes.items()} == {n: x.shape for n, x in EhrEncoder(config).state_dict().items()}
    assert dataclasses.replace(config, share_fusion=True).longest is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": 0}, "variables=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"flavor": "papr"}, "flavor='papr' is not one of"),
        ({"statics": -1}, "statics=-1"),
        ({"num_heads": 4}, "model_dim=6 is not a multiple of num_heads=4"),
        ({"attention": "mah"}, "unknown attention 'mah'"),
        ({"attention": {"kind": "mha", "model_dim": 3}}, "model.attention.model_dim is the model's own"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EhrEncoder(EhrConfig(**(SMALL | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": CELLS[:, :, :3]}, r"cells_NTVC has shape \[6, 15, 3, 4\]; it must be \[6, 15, 7, 4\]"),
        ({"statics": STATICS[:, :1]}, r"statics_NS has shape \[6, 1\]; it must be \[6, 3\]"),
        ({"hours": HOURS + 3}, r"hours_N=\[16, 8, 18, 5, 3, 13\] must lie between 0 and the 15 hours"),
        ({"hours": HOURS[:2]}, r"hours_N has shape \[2\]; it must be \[6\]"),
        ({"cells": cells(6, 20), "hours": HOURS + 5}, "hours_N has a stay of 20 hours.*hold 15.*share_fusion"),
    ],
)
def test_wrong_batches_are_refused(change, message):
    given = {"cells": CELLS, "statics": STATICS, "hours": HOURS} | change
    with pytest.raises(ValueError, match=message):
        model()(given["cells"], given["statics"], given["hours"])
    assert (VALUE, COUNT) == (0, 2)
