"""Odd values in tables of all formats: times out of reach, empty times, days that are none, rows that stand twice."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.events import FARTHEST, Events
from attnzoo.clinical.formats import load_cohort
from tests.helpers.clinical_files import (
    MIMIC_HEADER,
    write_csv,
    write_eicu,
    write_mimic,
    write_physionet,
    write_pmdata,
    write_stays,
    write_yaib,
)

NIGHT = {"dateOfSleep": "2020-01-03", "minutesAsleep": 400, "minutesAwake": 30, "timeInBed": 430, "efficiency": 93}
FITBIT = Path("pmdata/p03/fitbit")


def changed(path: Path, change: Callable[[dict[str, list]], object]) -> None:
    """Changes the columns of a parquet file."""
    import pyarrow.parquet

    columns = pyarrow.parquet.read_table(path).to_pydict()
    change(columns)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_times_that_int32_does_not_hold_lie_outside():
    events = Events.of([0, 0, 0], [2**32 + 44, -(2**40), 30], [0, 0, 0], [80, 81, 1e300])
    assert events.minutes_E.tolist() == [FARTHEST, -FARTHEST, 30]
    assert np.isinf(events.values_E[2])


@pytest.mark.parametrize("minute", [2**31, 99_999_999_999])
def test_a_far_offset_of_eicu_lies_outside(tmp_path, minute):
    before = load_cohort("eicu", write_eicu(tmp_path / "a"))
    path = write_eicu(tmp_path / "b") / "lab.csv"
    path.write_text(path.read_text() + f"1,{minute},{minute},sodium,150,mmol/L,mEq/L\n")
    after = load_cohort("eicu", tmp_path / "b")
    np.testing.assert_array_equal(after.grid.values_NTV, before.grid.values_NTV)
    late = "values after the last hour"
    assert after.report.left_out[late] == before.report.left_out[late] + 1
    path.write_text(path.read_text() + f"1,{10**20},{10**20},sodium,150,mmol/L,mEq/L\n")
    with pytest.raises(ValueError, match=r"lab\.csv, line \d+: labresultoffset='10+' is too large"):
        load_cohort("eicu", tmp_path / "b")
    patients = tmp_path / "a" / "patient.csv.gz"
    write_csv(patients, gzip.decompress(patients.read_bytes()).decode() + "9,,3000,Alive,Male,30,170,60,\n")
    with pytest.raises(ValueError, match=r"patient\.csv\.gz, line 6: uniquepid='' is empty"):
        load_cohort("eicu", tmp_path / "a")


def test_yaib_times(tmp_path):
    whole = load_cohort("yaib", write_yaib(tmp_path), hours=24)

    def far(columns):
        columns["time"] = [step.total_seconds() / 3600 for step in columns["time"]]
        columns["time"][3] = 71_582_789.0  # times 60 it is 44, if 32 bits are kept

    changed(tmp_path / "dyn.parquet", far)
    cohort = load_cohort("yaib", tmp_path, hours=24)
    assert cohort.grid.counts_NTV.sum() == whole.grid.counts_NTV.sum() - len(whole.grid.variables)
    np.testing.assert_array_equal(cohort.grid.values_NTV[:, 4:], whole.grid.values_NTV[:, 4:])
    with pytest.raises(ValueError, match=r"dyn\.parquet: time reaches hour 71,582,789; give hours=8784 or fewer"):
        load_cohort("yaib", tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("dyn", lambda c: c["time"].__setitem__(7, None), "row 8: time is empty"),
        ("dyn", lambda c: c["time"].__setitem__(1, c["time"][0]), "row 2: stay_id=30 has another row of hour 0; keep"),
        ("sta", lambda c: [column.clear() for column in c.values()], "has no stay"),
        ("outc", lambda c: c["label"].__setitem__(1, float("inf")), "row 2: label is infinite"),
        ("outc", lambda c: c.update(stay_id=[10, 10, 20], time=[0.0, 0.9, 0.0]), "row 2: stay_id=10 has another row"),
    ],
)
def test_rows_of_yaib_that_say_nothing_certain(tmp_path, file, change, told):
    changed(write_yaib(tmp_path) / f"{file}.parquet", change)
    with pytest.raises(ValueError, match=rf"{file}\.parquet,? {told}"):
        load_cohort("yaib", tmp_path)


def test_mimic_times(tmp_path):
    part = write_mimic(tmp_path)
    series = next(part.glob("577*"))
    commas = MIMIC_HEADER.count(",")
    series.write_text("\n".join([MIMIC_HEADER, f"1e300{',' * 9}80{',' * (commas - 9)}", ""]))
    assert load_cohort("mimic", part).report.left_out["values after the last hour"] == 1
    series.write_text("\n".join([MIMIC_HEADER, f"{',' * 9}80{',' * (commas - 9)}", ""]))
    with pytest.raises(ValueError, match=r"577_episode1_timeseries\.csv, line 2: Hours='' is empty"):
        load_cohort("mimic", part)
    write_csv(part / "listfile.csv", "stay,period_length,y_true\n577_episode1_timeseries.csv,,1\n")
    with pytest.raises(ValueError, match=r"listfile\.csv, line 2: period_length='' is empty"):
        load_cohort("mimic", part)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("sedentary_minutes", [{"dateTime": "2020-02-30", "value": 1}], "'2020-02-30' does not begin with a day"),
        ("sedentary_minutes", [{"dateTime": 20200102, "value": 1}], "20200102 does not begin with a day"),
        ("sedentary_minutes", [{"dateTime": "2020-01-02", "value": 10**400}], "is no number; mend it"),
        ("sleep", [{**NIGHT, "startTime": "late", "levels": {}}], "startTime='late' is no time"),
    ],
)
def test_days_and_numbers_of_pmdata_that_are_none(tmp_path, file, content, told):
    write_pmdata(tmp_path)
    (tmp_path / FITBIT / f"{file}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{file}\.json.*{told}"):
        load_cohort("pmdata", tmp_path)


def test_records_with_a_byte_order_mark_and_the_line_ends_of_windows(tmp_path):
    plain = load_cohort("physionet2012", write_physionet(tmp_path))
    record = tmp_path / "set-a" / "7.txt"
    record.write_bytes(b"\xef\xbb\xbf" + record.read_bytes().replace(b"\n", b"\r\n"))
    marked = load_cohort("physionet2012", tmp_path / "set-a")
    np.testing.assert_array_equal(marked.grid.values_NTV, plain.grid.values_NTV)
    np.testing.assert_array_equal(marked.statics_NS, plain.statics_NS)


def test_a_record_of_carriage_returns_alone_is_refused(tmp_path):
    (path := write_stays(tmp_path, 1) / "100.txt").write_bytes(b"Time,Parameter,Value\r00:00,RecordID,100\r")
    with pytest.raises(
        ValueError, match=r"100\.txt, line 1: 'Time,Parameter,Value\\r00:00,RecordID,100\\r' is not the"
    ):
        load_cohort("physionet2012", path.parent)


def test_a_kind_that_does_not_exist_is_dropped_and_counted(tmp_path):
    """A sex between two, and a unit of none of the four kinds: neither is known, and both were told as if they were."""
    path = write_stays(tmp_path, 2) / "100.txt"
    path.write_text(path.read_text().replace("Gender,0", "Gender,0.5").replace(",Age", ",ICUType,2.5\n00:00,Age", 1))
    cohort = load_cohort("physionet2012", path.parent)
    column = {name: cohort.statics_NS[:, i] for i, name in enumerate(cohort.statics)}
    assert (np.isnan(column["sex"]).tolist(), np.isnan(column["icu_type"]).tolist()) == ([True, False], [True, True])
    counts = cohort.report.values
    assert [counts[f"{name} at admission"]["dropped"] for name in ("sex", "icu_type", "age")] == [1, 1, 0]


@pytest.mark.parametrize("value", ["７３", "٧٣", "\u00a073", "73\u2003"])
def test_a_number_in_digits_or_spaces_of_other_scripts_is_refused_by_its_line(tmp_path, value):
    path = write_stays(tmp_path, 1) / "100.txt"
    path.write_text(path.read_text() + f"47:00,HR,{value}\n")
    with pytest.raises(ValueError, match=r"100\.txt, line \d+: HR='.+' is no number; mend the line or remove it"):
        load_cohort("physionet2012", path.parent)
