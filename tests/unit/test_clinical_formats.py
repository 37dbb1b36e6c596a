"""PhysioNet 2012, and what all formats keep: nothing from after the cut, checked options, errors that say where."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import FORMATS, load_cohort, physionet2012
from attnzoo.clinical.splits import folds
from attnzoo.clinical.statistics import Statistics
from scripts.render_formats import run_of
from tests.helpers.clinical_data import shared_data
from tests.helpers.clinical_files import WRITERS, write_physionet
from train.config_reader import load_config


def assert_same_inputs(cut: Cohort, whole: Cohort, hours: int) -> None:
    """The same stays, and what a model sees of the hours before the cut, bit for bit."""
    assert cut.stay_ids == whole.stay_ids
    np.testing.assert_array_equal(cut.grid.hours_N, whole.grid.hours_N)
    np.testing.assert_array_equal(cut.statics_NS, whole.statics_NS)
    np.testing.assert_array_equal(cut.grid.values_NTV[:, :hours], whole.grid.values_NTV[:, :hours])
    statistics = Statistics.fit(whole, np.arange(len(whole)))
    np.testing.assert_array_equal(statistics.cells(cut.grid)[:, :hours], statistics.cells(whole.grid)[:, :hours])


@pytest.mark.parametrize("hours", [12, 24, 48])
@pytest.mark.parametrize("name", WRITERS)
def test_what_comes_after_the_cut_changes_nothing_before(tmp_path, name, hours):
    """Files without the later events give the same inputs, and so does a shorter window. Outcomes change no input."""
    path = WRITERS[name](tmp_path / "whole")
    whole = load_cohort(name, path, hours=48)
    cut = load_cohort(name, WRITERS[name](tmp_path / "cut", hours), hours=48)
    assert_same_inputs(cut, whole, hours)
    if hours < 48:
        assert np.isfinite(whole.grid.values_NTV[:, hours:]).any(), "there must be something to cut"
        assert not np.isfinite(cut.grid.values_NTV[:, hours:]).any()
    other = load_cohort(name, WRITERS[name](tmp_path / "other", died=0), hours=48)
    assert_same_inputs(other, whole, 48)
    assert whole.label("mortality").sum() == 1
    assert other.label("mortality").sum() == 0
    shorter = load_cohort(name, path, hours=hours)
    places = [shorter.stay_ids.index(stay) for stay in whole.stay_ids]
    np.testing.assert_array_equal(shorter.grid.values_NTV[places], whole.grid.values_NTV[:, :hours])


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_command_of_the_page_trains_on_the_format(tmp_path, name):
    """As far as can be known without the data: its keys, and that the format gives what it predicts."""
    program, script, *words = run_of(name).split()
    assert (program, script, words[0]) == ("deepspeed", "train/main.py", "--config")
    config = load_config(words[1], words[2:])
    assert config.data["format"] == name
    if name in WRITERS:
        options = {key: value for key, value in config.data.items() if key not in ("format", "path")}
        cohort = load_cohort(name, WRITERS[name](tmp_path), **options)
        assert set(np.unique(cohort.label(config.task["label"]))) == {0, 1}
        assert cohort.grid.hours == config.model["chunks"] * config.model["chunk_hours"]
        assert (cohort.patient_ids is None) == (config.task["split"] == "stay")


def test_physionet_by_hand(tmp_path):
    cohort = physionet2012.load(write_physionet(tmp_path))
    assert cohort.stay_ids == ("7", "12")
    assert cohort.statics == ("age", "sex", "height", "weight", "icu_type")
    np.testing.assert_array_equal(
        cohort.statics_NS, np.array([[54, 0, np.nan, 80.6, 4], [31, 1, 175.3, np.nan, 3]], np.float32)
    )
    place = {name: i for i, name in enumerate(cohort.grid.variables)}
    values, counts = cohort.grid.values_NTV[0], cohort.grid.counts_NTV[0]
    assert (values[0, place["HR"]], counts[0, place["HR"]]) == (77, 2)
    assert values[1, place["FiO2"]] == 50
    assert values[0, place["Weight"]] == np.float32(80.6)
    np.testing.assert_array_equal(values[23:25, place["pH"]], np.array([7.3, 7.4], np.float32))
    assert cohort.report.values["Temp"]["dropped"] == 1
    assert cohort.report.left_out["values after the last hour"] == 1
    np.testing.assert_array_equal(cohort.labels["los_days"], [5, np.nan])
    assert physionet2012.load(tmp_path / "set-a", variables=("pH", "HR")).grid.variables == ("HR", "pH")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("00:61,HR,80", r"7\.txt, line 16: Time='00:61' is not hours and minutes"),
        ("07:42,HRR,80", r"7\.txt, line 16: unknown Parameter 'HRR'; did you mean 'HR'"),
        ("07:42,HR,eighty", r"7\.txt, line 16: HR='eighty' is no number"),
        ("07:42,HR,nan", r"7\.txt, line 16: HR='nan' is no number"),
        ("07:42,HR", r"7\.txt, line 16: '07:42,HR' has 2 fields"),
        ("00:00,RecordID,8", r"7\.txt: RecordID 8 is not the number in the file's name"),
    ],
)
def test_a_wrong_line_of_a_record_is_named(tmp_path, line, told):
    path = write_physionet(tmp_path)
    with (path / "7.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=told):
        physionet2012.load(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("set-a/7.txt", "time,x\n", r"7\.txt, line 1: 'time,x' is not the header"),
        ("Outcomes-a.txt", "RecordID,In-hospital_death\n7,0\n", "has no column 'Length_of_stay'"),
        ("Outcomes-a.txt", "RecordID,In-hospital_death,Length_of_stay\n7,0,1\n", "has no outcome of record 12"),
        (
            "Outcomes-a.txt",
            "RecordID,In-hospital_death,Length_of_stay\n7,2,1\n",
            "line 2: In-hospital_death='2' is neither",
        ),
        (
            "Outcomes-a.txt",
            "RecordID,In-hospital_death,Length_of_stay\n7,0,x\n",
            "line 2: Length_of_stay='x' is no number",
        ),
        ("Outcomes-a.txt", "RecordID,In-hospital_death,Length_of_stay\n7,0\n", "line 2: a row of another length"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, text, told):
    path = write_physionet(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        physionet2012.load(path)


def test_options_are_checked(tmp_path):
    path = write_physionet(tmp_path)
    for options, told in [
        ({"hours": 0}, "hours=0 is no length"),
        ({"hours": 49}, "hours=49 is no length of the window; give a whole number from 1 to 48"),
        ({"variables": "HR"}, "variables='HR' is one text"),
        ({"hour": 24}, r"unknown option 'hour' of the data format 'physionet2012'; did you mean 'hours'"),
        ({"variables": ("HR", "hr")}, "unknown variable 'hr'"),
        ({"variables": ("SOFA",)}, "'SOFA' can never be a feature"),
        ({"outcomes": tmp_path / "none.txt"}, "none.txt' does not exist"),
    ]:
        with pytest.raises(ValueError, match=told):
            load_cohort("physionet2012", path, **options)
    with pytest.raises(ValueError, match="unknown data format 'physionet'"):
        load_cohort("physionet", path)
    for name, told in [
        ("physionet2012", "holds no record"),
        ("pmdata", "holds no report"),
        ("eicu", "has no patient.csv"),
        ("fhir", "holds no file of .json"),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"empty {told}"):
            load_cohort(name, tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        load_cohort("physionet2012", tmp_path / "set-b")
    (tmp_path / "set-c.tar.gz").write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(ValueError, match=r"set-c.tar.gz cannot be read"):
        load_cohort("physionet2012", tmp_path / "set-c.tar.gz")
    assert sorted(FORMATS) == ["eicu", "fhir", "mimic", "mts_dialog", "physionet2012", "pmdata", "yaib"]


def test_parsed_records_are_cached_by_content(tmp_path):
    path, cache = write_physionet(tmp_path), tmp_path / "cache"
    archive = tmp_path / "set-a.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(path, "set-a")
    first = physionet2012.load(archive, cache=cache)
    again = physionet2012.load(archive, cache=cache)
    (kept,) = (cache / "clinical").iterdir()
    np.testing.assert_array_equal(first.grid.values_NTV, again.grid.values_NTV)
    np.testing.assert_array_equal(physionet2012.load(path).grid.values_NTV, first.grid.values_NTV)
    with (path / "7.txt").open("a") as changed:
        changed.write("02:00,HR,120\n")
    assert physionet2012.load(path, cache=cache).grid.values_NTV[0, 2, list(first.grid.variables).index("HR")] == 120
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged .* delete it"):
        physionet2012.load(archive, cache=cache)


@pytest.mark.heavy
def test_set_a(tmp_path):
    path = shared_data("physionet2012/set-a.tar.gz")
    cohort = physionet2012.load(path, cache=tmp_path)
    assert (len(cohort), int(cohort.labels["mortality"].sum())) == (4000, 554)
    assert cohort.grid.values_NTV.shape == (4000, 48, 37)
    empty = np.flatnonzero(cohort.grid.counts_NTV.sum((1, 2)) == 0)
    assert [cohort.stay_ids[row] for row in empty] == ["140501", "140936", "141264"]
    again = physionet2012.load(path, cache=tmp_path)
    np.testing.assert_array_equal(again.grid.values_NTV, cohort.grid.values_NTV)
    assert again.report == cohort.report
    with pytest.raises(ValueError, match="has no patient identifiers"):
        folds(cohort, 5)
    fold = folds(cohort, 5, by="stay", label="mortality")[0]
    statistics = Statistics.fit(cohort, fold.train)
    assert np.isfinite(statistics.cells(cohort.grid, empty)).all()
    assert np.isfinite(statistics.statics(cohort, empty)).all()
    deaths = [
        int(cohort.labels["mortality"][fold.test].sum()) for fold in folds(cohort, 5, by="stay", label="mortality")
    ]
    assert sorted(deaths) == [110, 111, 111, 111, 111]


@pytest.mark.parametrize("hours", [12, 24, 48])
def test_real_records_cut_at_the_hour(tmp_path, hours):
    for kind in ("whole", "cut"):
        (tmp_path / kind).mkdir()
    with tarfile.open(shared_data("physionet2012/set-a.tar.gz")) as archive:
        for _ in range(60):
            member = archive.next()
            file = archive.extractfile(member) if member is not None and member.isfile() else None
            if member is None or file is None:
                continue
            lines = file.read().decode().splitlines()
            kept = [lines[0], *(line for line in lines[1:] if int(line[:2]) < hours)]
            for kind, text in (("whole", lines), ("cut", kept)):
                (tmp_path / kind / Path(member.name).name).write_text("\n".join(text) + "\n")
    whole, cut = (physionet2012.load(tmp_path / kind) for kind in ("whole", "cut"))
    assert len(whole) > 50
    assert_same_inputs(cut, whole, hours)
