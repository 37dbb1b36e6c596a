"""YAIB, eICU, MIMIC-III and PMData: known numbers of the real data, small files by hand, patients kept apart."""

import gzip
from datetime import date

import numpy as np
import pytest

from attnzoo.clinical.formats import eicu, load_cohort, pmdata
from attnzoo.clinical.splits import folds, time_split
from tests.helpers.clinical_data import shared_data
from tests.helpers.clinical_files import write_csv, write_eicu, write_mimic, write_pmdata, write_yaib


@pytest.mark.parametrize(
    ("folder", "stays", "hours", "label", "total"),
    [
        ("los/eicu_demo", 2267, None, "los", 124094),
        ("mortality24/eicu_demo", 1367, 25, "mortality", 70),
        ("mortality24/mimic_demo", 99, 25, "mortality", 21),
    ],
)
def test_yaib_demo(folder, stays, hours, label, total):
    """total: deaths, or hours that have a label."""
    cohort = load_cohort("yaib", shared_data(f"yaib_demo/{folder}"))
    label_N = cohort.label(label)
    assert len(cohort) == stays
    assert int(label_N.sum() if label == "mortality" else (~np.isnan(label_N)).sum()) == total
    assert hours in (None, cohort.grid.hours)
    if label == "los":
        assert int(cohort.grid.hours_N.sum()) == total
        assert np.nanmax(label_N) == 168
        assert np.isnan(label_N[np.arange(cohort.grid.hours) >= cohort.grid.hours_N[:, None]]).all()
    used = sum(row["used"] for row in cohort.report.values.values())
    dropped = sum(row["dropped"] for row in cohort.report.values.values())
    assert dropped < 0.001 * used, cohort.report.lines()
    with pytest.raises(ValueError, match="has no patient identifiers"):
        folds(cohort, 5)


def test_yaib_by_hand(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = write_yaib(tmp_path)
    cohort = load_cohort("yaib", path)
    dyn = pyarrow.parquet.read_table(path / "dyn.parquet")
    assert cohort.stay_ids == ("10", "30", "20")
    first = [dyn[name][0].as_py() for name in cohort.grid.variables]  # dyn begins with stay 30
    assert cohort.grid.values_NTV[1, 0].tolist() == pytest.approx(first)
    np.testing.assert_array_equal(cohort.labels["mortality"], [1, 0, 0])
    np.testing.assert_array_equal(cohort.statics_NS[0], np.array([70, 1, 170, 70], np.float32))
    assert np.isnan(cohort.statics_NS[1]).tolist() == [False, True, True, True], "a height of 12 cm is impossible"
    number = pyarrow.array(range(150), "float64")
    for file, column, values, told in [
        ("dyn", "sofa", number, "'sofa' can never be a feature"),
        ("dyn", "pulse", number, "unknown variable 'pulse'"),
        ("dyn", "hr", pyarrow.array(["fast"] * 150), "dyn.parquet: column 'hr' of string holds no numbers"),
        ("dyn", "stay_id", pyarrow.array(range(150)), r"dyn.parquet, row 1: stay_id=0 is not in sta.parquet"),
        ("dyn", "time", None, "dyn.parquet has no column 'time'"),
        ("sta", "sex", pyarrow.array(["M", None, None]), "sta.parquet, row 1: sex='M'; known: Female, Male"),
        ("sta", "stay_id", pyarrow.array([10, 10, 20]), "sta.parquet has several rows of one stay"),
        ("outc", "stay_id", pyarrow.array([10, 10, 20]), "outc.parquet has no time and several labels"),
    ]:
        whole = pyarrow.parquet.read_table(path / f"{file}.parquet")
        changed = whole.drop_columns(column) if column in whole.column_names else whole
        changed = changed if values is None else changed.append_column(column, values)
        pyarrow.parquet.write_table(changed, path / f"{file}.parquet")
        with pytest.raises(ValueError, match=told):
            load_cohort("yaib", path)
        pyarrow.parquet.write_table(whole, path / f"{file}.parquet")
    (path / "sta.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"sta.parquet is no readable parquet file"):
        load_cohort("yaib", path)


def test_eicu_demo():
    path = shared_data("eicu_demo_text")
    cohort = load_cohort("eicu", path, task="los", hours=72)
    assert len(cohort) + sum(n for reason, n in cohort.report.left_out.items() if "stays" in reason) == 174
    assert cohort.patient_ids is not None
    assert len(set(cohort.patient_ids)) < len(cohort)
    for fold in folds(cohort, 3, seed=4):
        train, test = ({cohort.patient_ids[row] for row in rows} for rows in (fold.train, fold.test))
        assert train.isdisjoint(test)
    deaths = load_cohort("eicu", path)
    assert set(np.unique(deaths.label("mortality"))) == {0, 1}
    # 157 of the stays are also in YAIB's table of the same database: the values of both are the same.
    other = load_cohort("yaib", shared_data("yaib_demo/los/eicu_demo"))
    place = {stay: row for row, stay in enumerate(other.stay_ids)}
    both = [(row, place[stay]) for row, stay in enumerate(cohort.stay_ids) if stay in place]
    assert len(both) == 157
    for name in ("na", "crea", "hgb"):
        column = cohort.grid.variables.index(name), other.grid.variables.index(name)
        ours = [set(cohort.grid.values_NTV[a, :, column[0]]) for a, _ in both]
        theirs = [set(other.grid.values_NTV[b, :72, column[1]]) for _, b in both]
        shared = sum(len({v for v in a if v == v} & b) for a, b in zip(ours, theirs, strict=True))
        assert shared > 0.9 * sum(len({v for v in a if v == v}) for a in ours), name


def test_eicu_by_hand(tmp_path):
    path = write_eicu(tmp_path)
    cohort = eicu.load(path, hours=48)
    assert (cohort.stay_ids, cohort.patient_ids) == (("1", "2"), ("a", "a"))
    assert cohort.report.left_out["stays shorter than 48 hours"] == 1
    assert cohort.report.left_out["stays without a known outcome"] == 1
    assert cohort.report.values["fio2"] == {"used": 1, "clipped": 0, "dropped": 0, "unknown unit": 1}
    values = {name: cohort.grid.values_NTV[:, :, i] for i, name in enumerate(cohort.grid.variables)}
    assert values["na"][0, 1] == 140, "known when it was revised"
    assert (values["crp"][0, 17], values["fio2"][1, 25], values["glu"][1, 13]) == (12, 40, 100)
    assert cohort.statics_NS[0].tolist() == [90, 1, pytest.approx(170.2), 70]
    los = eicu.load(path, task="los", hours=48)
    assert len(los) == 4
    np.testing.assert_array_equal(los.grid.hours_N, [48, 48, 2, 48])
    np.testing.assert_array_equal(los.labels["los"][2, :3], [1, 0, np.nan])
    for name, old, new, told in [
        ("patient.csv.gz", ",3000,", ",soon,", "patient.csv.gz, line 2: unitdischargeoffset='soon' is no whole number"),
        ("patient.csv.gz", "Expired", "Dead", "line 2: hospitaldischargestatus='Dead' is neither"),
        ("lab.csv", "sodium,140", "sodium,high", "lab.csv, line 2: labresult='high' is no number"),
    ]:
        opened = gzip.open if name.endswith("gz") else open
        with opened(path / name, "rt") as file:
            text = file.read()
        write_csv(path / name, text.replace(old, new))
        with pytest.raises(ValueError, match=told):
            eicu.load(path, task="los")
        write_csv(path / name, text)


def test_eicu_texts_stop_at_the_cut(tmp_path):
    write_csv(
        tmp_path / "diagnosis.csv", "patientunitstayid,diagnosisoffset,diagnosisstring\n1,30,sepsis\n1,1500,death\n"
    )
    write_csv(tmp_path / "treatment.csv", "patientunitstayid,treatmentoffset,treatmentstring\n1,10,oxygen\n")
    assert eicu.load_texts(tmp_path, 24) == {"1": [(10, "treatment", "oxygen"), (30, "diagnosis", "sepsis")]}
    texts = eicu.load_texts(shared_data("eicu_demo_text"), 24)
    rows = [row for written in texts.values() for row in written]
    assert max(minute for minute, _, _ in rows) < 24 * 60
    assert {table for _, table, _ in rows} == set(eicu.TEXTS)


def test_mimic_by_hand(tmp_path):
    cohort = load_cohort("mimic", write_mimic(tmp_path))
    assert cohort.patient_ids == ("577", "10026", "10026")
    values = {name: cohort.grid.values_NTV[2, :, i] for i, name in enumerate(cohort.grid.variables)}
    verbal = values["Glascow coma scale verbal response"]
    assert (verbal[0], verbal[2]) == (5, 4)
    assert np.isnan(verbal[1])
    assert cohort.report.left_out["verbal responses of intubated patients"] == 30
    assert values["Fraction inspired oxygen"][1] == 21
    hourly = tmp_path / "length-of-stay" / "train"
    for path in (tmp_path / "in-hospital-mortality" / "train").glob("*_timeseries.csv"):
        write_csv(hourly / path.name, path.read_text())
    write_csv(
        tmp_path / "length-of-stay" / "train_listfile.csv",
        "stay,period_length,y_true\n577_episode1_timeseries.csv,5.0,43.2\n577_episode1_timeseries.csv,6.0,42.2\n",
    )
    los = load_cohort("mimic", tmp_path / "length-of-stay" / "train_listfile.csv", hours=24)
    assert los.grid.hours_N.tolist() == [6]
    assert los.label("los")[0, 4:6].tolist() == [pytest.approx(43.2), pytest.approx(42.2)]
    write_csv(tmp_path / "x" / "listfile.csv", "stay,y_true\nx.csv,1\n")
    with pytest.raises(ValueError, match=r"line 2: stay='x.csv' is not called SUBJECT_episode"):
        load_cohort("mimic", tmp_path / "x")


def test_pmdata_by_hand(tmp_path):
    whole = pmdata.load(write_pmdata(tmp_path / "whole"), days=4)
    assert (len(whole), whole.grid.hours, whole.grid.step_hours) == (31, 4, 24)
    row = whole.stay_ids.index("p03 2020-01-10")
    sedentary = whole.grid.variables.index("sedentary_minutes")
    assert whole.grid.values_NTV[row, :, sedentary].tolist() == [606, 607, 608, 609], (
        "the days before, not the day itself"
    )
    asleep = whole.grid.variables.index("sleep_minutes")
    assert np.nanmin(whole.grid.values_NTV[:, :, asleep]) == 400, "naps are no nights"
    assert np.nanmax(whole.grid.values_NTV[:, :, whole.grid.variables.index("bedtime")]) == 12.5
    assert [whole.labels["fatigue"][day - 1] for day in (5, 6, 7)] == [1, 1, 0]
    assert np.isnan(whole.labels["stress"]).all()
    cut = pmdata.load(write_pmdata(tmp_path / "cut", date(2020, 1, 20)), days=4)
    np.testing.assert_array_equal(cut.grid.values_NTV, whole.grid.values_NTV[:20])
    write_csv(tmp_path / "cut" / "pmdata" / "p03" / "fitbit" / "sleep.json", '[{"dateOfSleep": "2020-01-01"}]')
    with pytest.raises(ValueError, match=r"sleep.json, entry 0: there is no 'startTime'"):
        pmdata.load(tmp_path / "cut")


@pytest.mark.heavy
def test_pmdata():
    cohort = load_cohort("pmdata", shared_data("pmdata/pmdata.tar.gz"))
    assert cohort.patient_ids is not None
    assert len(set(cohort.patient_ids)) == 16
    assert cohort.grid.values_NTV.shape[1:] == (15, 21)
    measured = np.isfinite(cohort.grid.values_NTV).any((0, 1))
    assert measured.all(), "each variable is measured by someone"
    assert 0.05 < np.nanmean(cohort.labels["mood"]) < 0.12
    fold = time_split(cohort, gap_days=1)
    assert cohort.dates is not None
    for person in set(cohort.patient_ids):
        own = np.array([p == person for p in cohort.patient_ids])
        train, test = (cohort.dates[rows[own[rows]]] for rows in (fold.train, fold.test))
        assert len(test) == 0 or len(train) == 0 or train.max() < test.min()
