"""Case studies without a server: what the writer sees, and that each section sees those before it."""

import argparse
from datetime import date

import numpy as np
import pytest

from attnzoo.clinical.case_study import CASE_STUDIES, FITNESS, SLEEP, data_text, measured_days, write_case
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.ratings import read_ratings
from attnzoo.clinical.rubric import CASE_STUDY, OVERALL
from attnzoo.clinical.variables import PMDATA
from scripts.case_studies.cases import RUBRICS, chosen_rows, rated, rating_rows
from scripts.case_studies.cli import add_arguments
from scripts.exams.endpoint import Answer
from tests.helpers.clinical_data import shared_data, small_cohort
from tests.helpers.clinical_files import write_pmdata


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return load_cohort("pmdata", write_pmdata(tmp_path_factory.mktemp("pm")) / "pmdata", days=4)


def test_the_table_has_what_was_measured_and_nothing_else(cohort):
    row = cohort.stay_ids.index("p03 2020-01-04")  # of its four days the first lies before all measurements
    values = cohort.grid.values_NTV[row][
        :, [cohort.grid.variables.index(name) for name in ("sleep_minutes", "bedtime")]
    ]
    assert np.isnan(values[0]).all()
    assert values[1:].tolist() == [[400, 12.5]] * 3
    lines = data_text(cohort, row, SLEEP).splitlines()
    assert "- bedtime: start of sleep, in hours after noon, in h" in lines
    table = [line.split(" | ") for line in lines if " | " in line]
    assert table[0] == ["day", "sleep_minutes", "awake_minutes", "bed_minutes", "sleep_efficiency", "bedtime"]
    assert table[1] == ["-4", "-", "-", "-", "-", "-"]
    assert table[4] == ["-1", "400", "30", "430", "93", "12.5"]
    assert [line[:2] for line in table[5:]] == [
        ["mean", "400"], ["standard deviation", "0"], ["lowest", "400"], ["highest", "400"]
    ]  # fmt: skip
    assert "2020" not in "\n".join(lines)
    assert measured_days(cohort, row, SLEEP) == 3
    sedentary = data_text(cohort, row, FITNESS)
    assert "-1 | 603 | 400" in sedentary
    assert "602 | 1\n" not in sedentary
    assert "mean | 602" in sedentary


def test_each_section_sees_those_before_it():
    asked = []

    def write(prompt: str) -> str:
        asked.append(prompt)
        return f" text {len(asked)} "

    case = write_case(FITNESS, "x", "the data", write)
    assert dict(case.sections) == {
        "training_load": "text 1", "sleep": "text 2", "health_metrics": "text 3", "assessment": "text 4"
    }  # fmt: skip
    for place, (prompt, section) in enumerate(zip(asked, FITNESS.sections, strict=True)):
        assert [f"text {n}" in prompt for n in range(1, 5)] == [n <= place for n in range(1, 5)]
        assert "the data" in prompt
        assert prompt.index(section.question) > prompt.index("the data")
    with pytest.raises(ValueError, match="case 'x': the section 'training_load' came without a text"):
        write_case(FITNESS, "x", "the data", lambda prompt: " \n")


def test_studies_have_the_names_of_the_published_ratings():
    for study in CASE_STUDIES.values():
        assert set(study.variables) <= set(PMDATA)
        file = shared_data(f"phllm/{study.name}_human_expert_ratings.tsv.gz")
        tags = {key[1] for rater in read_ratings(file).values() for key in rater}
        assert tags == {section.tag for section in study.sections} | {OVERALL}


def test_which_days_are_written_about(cohort):
    assert chosen_rows(cohort, SLEEP, ["p03 2020-01-09", "p03 2020-01-02"], None, 0) == [8, 1]
    drawn = chosen_rows(cohort, SLEEP, [], 5, 0)
    assert drawn == chosen_rows(cohort, SLEEP, [], 5, 0) != chosen_rows(cohort, SLEEP, [], 5, 1)
    # Of the days before the first two reports less than half are measured.
    assert chosen_rows(cohort, SLEEP, [], 29, 0) == list(range(2, 31))
    for stays, count, message in (
        (["p03 2020-02-09"], None, "no such person and day; did you mean"),
        (["p03 2020-01-09"] * 2, None, "stands twice"),
        ([], 30, "--count=30 must be 1 to 29"),
        ([], 0, "--count=0 must be 1 to 29"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen_rows(cohort, SLEEP, stays, count, 0)
    with pytest.raises(ValueError, match="'p03 2020-01-01' has no measurement for a sleep case study"):
        data_text(cohort, 0, SLEEP)
    with pytest.raises(ValueError, match="needs daily values; the steps of 'made up' have 1 h"):
        data_text(small_cohort(), 0, SLEEP)


def test_ratings_by_principle(cohort):
    case = write_case(SLEEP, "x", data_text(cohort, 9, SLEEP), lambda prompt: "A text.")
    answers = {"no_hallucinations": "Rating: 2", "readable": "no idea"}
    questions = {CASE_STUDY.principle(name).question: answer for name, answer in answers.items()}
    found = rated(
        CASE_STUDY,
        [case],
        lambda prompt: Answer(next((told for question, told in questions.items() if question in prompt), "Rating: 5")),
    )
    rows = {row.pop("principle"): row for row in rating_rows(found)}
    assert len(rows) == 15
    assert rows["no_hallucinations"] == {"mean": 2.0, "ratings": 3, "unread": 0}
    assert rows["readable"] == {"mean": None, "ratings": 0, "unread": 1}
    assert rows["overall_quality"] == {"mean": 5.0, "ratings": 1, "unread": 0}
    assert {row["mean"] for name, row in rows.items() if name not in answers} == {5.0}
    assert date.fromisoformat(str(cohort.dates[9])) == date(2020, 1, 10)


def test_the_command_offers_what_there_is():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    offered = {action.dest: action.choices for action in parser._actions}
    assert (offered["kind"], offered["rate"]) == (tuple(CASE_STUDIES), tuple(RUBRICS))
