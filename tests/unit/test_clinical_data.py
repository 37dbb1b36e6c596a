"""Grid, units, ranges, denylist, splits and statistics: what is measured is kept, and nothing leaks."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from attnzoo.clinical.cohort import StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.grid import Grid, grid_of
from attnzoo.clinical.splits import folds, time_split
from attnzoo.clinical.statistics import Statistics, coverage
from attnzoo.clinical.units import FAMILIES, convert
from attnzoo.clinical.variables import (
    MIMIC3,
    PHYSIONET2012,
    PMDATA,
    QUANTITIES,
    STATICS,
    VARIABLES,
    YAIB,
    choose,
    refuse_forbidden,
)
from tests.helpers.clinical_data import small_cohort


def events_of(*rows: tuple[int, int, int, float]) -> Events:
    stays, minutes, variables, values = zip(*rows, strict=True)
    return Events(
        np.array(stays, np.int32),
        np.array(minutes, np.int32),
        np.array(variables, np.int16),
        np.array(values, np.float32),
    )


def test_tables_are_whole():
    assert [len(table) for table in (PHYSIONET2012, YAIB, MIMIC3, PMDATA)] == [37, 48, 17, 21]
    for table in (PHYSIONET2012, YAIB, MIMIC3, PMDATA):
        for name, variable in table.items():
            assert variable.name == name
            assert VARIABLES[name].quantity == variable.quantity, f"{name} means two things"
    for variable in QUANTITIES.values():
        (low, high), (least, most) = variable.plausible, variable.possible
        assert least <= low < high <= most, variable
        assert variable.unit in FAMILIES, variable
        assert not variable.log1p or low >= 0, variable
        refuse_forbidden([variable.name], "table")


@pytest.mark.parametrize(
    ("name", "value", "unit", "wanted"),
    [
        ("Temp", 98.6, "[degF]", 37.0),
        ("Temp", 37.0, "Cel", 37.0),
        ("temp", 310.15, "K", 37.0),
        ("Glucose", 5.55, "mmol/L", 99.99),
        ("glu", 100.0, "MG/DL", 100.0),
        ("BUN", 7.14, "mmol/L", 20.0),
        ("Creatinine", 88.42, "umol/L", 1.0),
        ("Bilirubin", 17.1, "umol/L", 1.0),
        ("cai", 4.008, "mg/dL", 1.0),
        ("ca", 2.5, "mmol/L", 10.02),
        ("Mg", 1.0, "meq/L", 1.21525),
        ("K", 4.1, "mEq/L", 4.1),
        ("Lactate", 9.008, "mg/dL", 1.0),
        ("crp", 3.0, "mg/dL", 30.0),
        ("hgb", 120.0, "g/L", 12.0),
        ("FiO2", 0.21, "1", 21.0),
        ("FiO2", 21.0, "%", 21.0),
        ("FiO2", 0.21, "%", 21.0),
        ("FiO2", 1.0, "1", 100.0),
        ("Weight", 154.3236, "[lb_av]", 70.0),
        ("Weight", 70000.0, "g", 70.0),
        ("height", 70.0, "in", 177.8),
        ("height", 1.78, "m", 178.0),
        ("PaO2", 12.0, "kPa", 90.0074),
        ("plt", 250000.0, "/uL", 250.0),
        ("wbc", 8.0, "10*9/L", 8.0),
    ],
)
def test_units(name, value, unit, wanted):
    assert convert({**STATICS, **VARIABLES}[name], value, unit) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("name", "unit"), [("Glucose", "U/L"), ("Temp", ""), ("Weight", "stone"), ("Mg", "furlong")])
def test_an_unknown_unit_is_refused(name, unit):
    with pytest.raises(ValueError, match=rf"'{name}' has the unit '{unit}', which is not known for it; give "):
        convert(VARIABLES[name], 1.0, unit)


def test_implausible_values_are_clipped_or_dropped_and_counted():
    table = choose(PHYSIONET2012, ("HR", "pH", "FiO2"), "variables")
    order = list(table)
    facts = StayFacts(
        name="made up",
        hours_N=np.array([3]),
        statics={"age": np.array([54.0]), "height": np.array([13.0])},
        stay_ids=("7",),
        unknown_units=Counter({"HR": 4}),
    )
    given = [("HR", 70), ("HR", 260), ("HR", -5), ("pH", 735), ("pH", 7.4), ("FiO2", 7), ("HR", np.nan)]
    events = events_of(*[(0, i * 20, order.index(name), value) for i, (name, value) in enumerate(given)])
    cohort = cohort_of(facts, events, table, 3)
    values = cohort.report.values
    assert values["HR"] == {"used": 2, "clipped": 1, "dropped": 2, "unknown unit": 4}
    assert values["pH"] == {"used": 1, "clipped": 0, "dropped": 1, "unknown unit": 0}
    assert values["FiO2"]["dropped"] == 1, "neither a fraction nor a percentage"
    assert values["height at admission"]["dropped"] == 1
    assert np.isnan(cohort.statics_NS[0, 1])
    assert cohort.statics_NS[0, 0] == 54
    assert cohort.grid.values_NTV[0, 0, order.index("HR")] == 250
    assert any(
        line.startswith("HR: 2 values used, 1 clipped, 2 dropped, 4 unknown unit") for line in cohort.report.lines()
    )


def test_the_grid_keeps_the_last_value_of_an_hour():
    events = events_of(
        (1, 59, 0, 3.0),
        (1, 59, 0, 2.0),
        (1, 0, 0, 1.0),
        (0, 60, 1, 9.0),
        (0, 119, 0, 4.0),
        (0, -1, 0, 8.0),
        (1, 120, 0, 5.0),
        (0, 180, 0, 6.0),
    )
    grid, outside = grid_of(events, np.array([3, 2]), 3, ("a", "b"))
    nan = np.nan
    np.testing.assert_array_equal(
        grid.values_NTV, np.array([[[nan, nan], [4, 9], [nan, nan]], [[2, nan], [nan, nan], [nan, nan]]], np.float32)
    )
    np.testing.assert_array_equal(grid.counts_NTV, [[[0, 0], [1, 1], [0, 0]], [[3, 0], [0, 0], [0, 0]]])
    assert outside == {"values before admission": 1, "values after the last hour": 2}
    many = events_of(*[(0, 5, 0, float(i)) for i in range(300)])
    assert grid_of(many, np.array([1]), 1, ("a",))[0].counts_NTV[0, 0, 0] == 255
    nothing = events_of((0, 5, 0, 1.0)).where(np.array([False]))
    assert np.isnan(grid_of(nothing, np.array([1]), 1, ("a",))[0].values_NTV).all()


@pytest.mark.parametrize(
    "name", ["SAPS-I", "SOFA", "Length_of_stay", "LOS", "Survival", "RecordID", "In-hospital_death", "stay_id"]
)
def test_scores_outcomes_and_record_numbers_are_no_features(name):
    refused = rf"'{name}' can never be a feature"
    cohort, statistics = small_cohort(), Statistics.fit(small_cohort(), np.arange(9))
    with pytest.raises(ValueError, match=refused):
        choose(PHYSIONET2012, ("HR", name), "variables")
    with pytest.raises(ValueError, match=refused):
        replace(cohort, grid=replace(cohort.grid, variables=("HR", name, "pH")))
    with pytest.raises(ValueError, match=refused):
        replace(cohort, statics=("age", name))
    with pytest.raises(ValueError, match=refused):
        Statistics.from_dict({**statistics.to_dict(), "variables": ["HR", name, "pH"]})


def test_folds_keep_patients_apart():
    cohort = small_cohort(stays=97, patients=31)
    made = folds(cohort, 5, label="mortality", seed=3)
    patients = np.array(cohort.patient_ids)
    for fold in made:
        parts = [set(patients[rows]) for rows in (fold.train, fold.validation, fold.test)]
        assert all(parts), "no part is empty"
        assert parts[0].isdisjoint(parts[1] | parts[2])
        assert parts[1].isdisjoint(parts[2])
        assert len(fold.train) + len(fold.validation) + len(fold.test) == len(cohort)
    assert sorted(np.concatenate([fold.test for fold in made])) == list(range(len(cohort)))


def test_folds_are_stratified_and_the_same_everywhere():
    cohort = small_cohort(stays=400, patients=None)
    made = folds(cohort, 5, by="stay", label="mortality", seed=1)
    for fold in made:
        assert [int(cohort.labels["mortality"][rows].sum()) for rows in (fold.test, fold.validation)] == [16, 8]
    # Known numbers: another machine, another order of rows or another numpy must find the same rows.
    assert made[0].test[:5].tolist() == [0, 1, 4, 6, 13]
    turned = replace(
        cohort, stay_ids=cohort.stay_ids[::-1], labels={"mortality": cohort.labels["mortality"][::-1].copy()}
    )
    again = folds(turned, 5, by="stay", label="mortality", seed=1)
    assert {turned.stay_ids[row] for row in again[0].validation} == {cohort.stay_ids[row] for row in made[0].validation}
    other = folds(cohort, 5, by="stay", label="mortality", seed=2)
    assert other[0].test.tolist() != made[0].test.tolist()


def test_a_split_by_patient_needs_patients():
    cohort = small_cohort(patients=None)
    with pytest.raises(ValueError, match=r"has no patient identifiers.*by='stay'; in a run task.split=stay"):
        folds(cohort, 5)
    for options, told in [
        ({"k": 1}, "k=1 folds"),
        ({"k": 99, "by": "stay"}, "fewer than k=99"),
        ({"k": 3, "by": "row"}, "by='row' is no way to split"),
        ({"k": 3, "by": "stay", "label": "los"}, "has no label 'los'; it has mortality"),
        ({"k": 3, "by": "stay", "validation": 1.0}, "validation=1.0"),
    ]:
        with pytest.raises(ValueError, match=told):
            folds(cohort, **options)
    with pytest.raises(ValueError, match="has no dates"):
        time_split(cohort)


def test_a_split_in_time_is_one_for_each_patient():
    dates = np.datetime64("2020-01-01") + np.arange(46) // 2
    cohort = replace(small_cohort(stays=46, patients=2), dates=dates)
    fold = time_split(cohort, test=0.3, validation=0.2, gap_days=1)
    for patient in (0, 1):
        train, validation, test = (
            dates[rows[rows % 2 == patient]] for rows in (fold.train, fold.validation, fold.test)
        )
        assert train.max() < validation.min() - 1
        assert validation.max() < test.min() - 1
        assert len(test) == 7


def test_statistics_see_training_rows_only():
    cohort = small_cohort()
    train, test = np.arange(0, 25), np.arange(25, 40)
    fitted = Statistics.fit(cohort, train)
    changed = cohort.grid.values_NTV.copy()
    changed[test] = changed[test] * 3 + 100
    statics_NS = cohort.statics_NS.copy()
    statics_NS[test] += 9
    other = replace(cohort, grid=replace(cohort.grid, values_NTV=changed), statics_NS=statics_NS)
    assert Statistics.fit(other, train) == fitted
    assert Statistics.fit(other, np.arange(26)) != fitted, "a row that is fitted on must count"
    again = Statistics.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted
    np.testing.assert_array_equal(again.cells(cohort.grid), fitted.cells(cohort.grid))
    measured = np.log1p(cohort.grid.values_NTV[train, :, 1].astype(np.float64))
    assert fitted.logged == (False, True, False)
    assert fitted.means[1] == pytest.approx(np.nanmean(measured), rel=1e-6)
    assert fitted.deviations[1] == pytest.approx(np.nanstd(measured), rel=1e-6)


def test_cells_by_hand():
    nan = np.nan
    values = np.array([[[80.0], [nan], [nan], [100.0]], [[nan], [nan], [5000.0], [nan]]], np.float32)
    counts = (~np.isnan(values)).astype(np.uint8) * 2
    grid = Grid(values, counts, np.array([4, 3]), ("HR",))
    cohort = replace(
        small_cohort(stays=2, hours=4, variables=("HR",)),
        grid=grid,
        statics_NS=np.array([[40.0, 1.0], [nan, nan]], np.float32),
    )
    statistics = Statistics.fit(cohort, np.array([0]))
    cells = statistics.cells(grid)
    assert cells.dtype == np.float32
    np.testing.assert_allclose(cells[0, :, 0, 0], [-1, 0, 0, 1])
    np.testing.assert_allclose(cells[0, :, 0, 1], [1, 0, 0, 1])
    np.testing.assert_allclose(cells[0, :, 0, 2], [np.log(3), 0, 0, np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(cells[0, :, 0, 3], [0, 1 / 48, 2 / 48, 0])
    np.testing.assert_allclose(cells[1, :, 0, 0], [0, 0, 5, 0])
    np.testing.assert_allclose(cells[1, :, 0, 3], [1, 1, 0, 0], err_msg="the last hour is padding")
    np.testing.assert_array_equal(statistics.cells(grid.until(3)), cells[:, :3])
    np.testing.assert_array_equal(statistics.cells(grid, np.array([1])), cells[1:])
    assert statistics.static_columns == ("age", "age known", "sex: female", "sex: male", "sex known")
    np.testing.assert_array_equal(statistics.statics(cohort), [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(coverage(grid), [0.5, 1 / 3])
    for wrong, told in [(Grid(values, counts, grid.hours_N, ("pH",)), "missing: HR; unknown: pH")]:
        with pytest.raises(ValueError, match=told):
            statistics.cells(wrong)
    with pytest.raises(ValueError, match="a stay of 5 hours; the model was trained on 4"):
        statistics.cells(Grid(np.zeros((1, 5, 1)), np.zeros((1, 5, 1)), np.array([5]), ("HR",)))
    with pytest.raises(ValueError, match="'means' has 2 entries for 1 variables"):
        Statistics.from_dict({**statistics.to_dict(), "means": [0.0, 1.0]})
