"""Tables of ratings, and the published ones of PH-LLM's case studies: their agreement to three digits."""

import gzip
from pathlib import Path

import pytest

from attnzoo.clinical import agreement as a
from attnzoo.clinical import ratings as r
from attnzoo.clinical.bootstrap import interval

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "phllm"
PUBLISHED = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/data, the published ratings, is not here")
HEAD = "case_study_id\trater\ttag\tprinciple\tconversation_source\trating"

POOLED = {
    "sleep": (12, 4861, 0.626, 0.234, 0.290, 0.906, 0.290),
    "fitness": (11, 6200, 0.652, 0.071, 0.069, 0.939, 0.069),
}
"""Pairs of raters, pairs of ratings, exact agreement, linear and quadratic kappa, AC2, ICC(2,1)."""
PAIRS = [
    ("sleep", "sleep_primary_a", "sleep_secondary_a", 741, 0.309, 0.904),
    ("sleep", "sleep_primary_b", "sleep_secondary_c", 936, 0.271, 0.906),
    ("sleep", "sleep_primary_b", "sleep_primary_d", 507, 0.471, 0.955),
    ("fitness", "fitness_primary_c", "fitness_secondary_a", 1428, 0.021, 0.888),
]
"""Pairs of ratings, quadratic kappa, AC2."""
AUTOMATIC = {"gemini_pro_baseline": (0.689, 0.267, 0.917), "sleep_primary_c_high_var": (0.565, 0.362, 0.842)}
"""Exact agreement with the experts on 10,733 ratings, quadratic kappa, AC2."""

kappa, ac2 = a.weighted_kappa(a.LIKERT, "quadratic"), a.gwet_ac2(a.LIKERT)


@pytest.fixture(scope="module")
def published():
    return {name: r.read_ratings(FOLDER / f"{name}_human_expert_ratings.tsv.gz") for name in POOLED}


@PUBLISHED
@pytest.mark.parametrize("name", POOLED)
def test_experts_agree_as_far_as_published(name, published):
    pairs = r.all_pairs(published[name])
    everyone = r.pooled(pairs)
    metrics = (a.exact_agreement, a.weighted_kappa(a.LIKERT, "linear"), kappa, ac2, a.icc)
    found = [round(metric(everyone.first, everyone.second), 3) for metric in metrics]
    assert (len(pairs), len(everyone), *found) == POOLED[name]
    bounds = interval(ac2, everyone.first, everyone.second, everyone.cases, resamples=200)
    assert bounds.low < POOLED[name][5] < bounds.high
    assert bounds.patients == len(set(everyone.cases))


@PUBLISHED
@pytest.mark.parametrize(("name", "first", "second", "count", "by_kappa", "by_ac2"), PAIRS)
def test_two_experts_agree_as_far_as_published(name, first, second, count, by_kappa, by_ac2, published):
    found = r.pair(published[name], first, second)
    measured = (round(metric(found.first, found.second), 3) for metric in (kappa, ac2))
    assert (len(found), *measured) == (count, by_kappa, by_ac2)


@PUBLISHED
@pytest.mark.parametrize("judge", AUTOMATIC)
def test_an_automatic_judge_agrees_with_experts_as_far_as_published(judge):
    path = FOLDER / "sleep_autoeval_external_ratings.tsv.gz"
    people = r.read_ratings(path, "rating_human_expert")
    del people["no_human_rater"]
    found = r.against(people, r.read_ratings(path, f"rating_autoeval_{judge}"))
    measured = (round(metric(found.first, found.second), 3) for metric in (a.exact_agreement, kappa, ac2))
    assert (len(found), *measured) == (10_733, *AUTOMATIC[judge])


def table(path: Path, *rows: str) -> Path:
    text = "\n".join([HEAD, *("\t".join(row.split()) for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["x.tsv", "x.tsv.gz"])
def test_what_was_rated_twice_has_the_mean(name, tmp_path):
    rows = (
        "c1 ann insights p m 4",
        "c1 ann insights p m 5",
        "c1 bob insights p m 2",
        "c2 ann insights p m 1",
        "c2 eve t p m 3",
    )
    found = r.read_ratings(table(tmp_path / name, *rows))
    assert list(found) == ["ann", "bob", "eve"]
    assert found["ann"] == {("c1", "insights", "p", "m"): 4.5, ("c2", "insights", "p", "m"): 1.0}
    pairs = r.all_pairs(found)
    assert list(pairs) == [("ann", "bob")]
    both = pairs["ann", "bob"]
    assert [both.first.tolist(), both.second.tolist(), both.cases.tolist()] == [[4.5], [2.0], ["c1"]]
    with pytest.raises(ValueError, match="'ann' and 'eve' rated nothing in common"):
        r.pair(found, "ann", "eve")
    with pytest.raises(ValueError, match="no ratings of 'tom'; there are those of ann, bob, eve"):
        r.pair(found, "ann", "tom")
    with pytest.raises(ValueError, match="no rater in common: bob, and eve"):
        r.against({"bob": found["bob"]}, {"eve": found["eve"]})


def test_tables_that_hold_no_ratings(tmp_path):
    with pytest.raises(ValueError, match=r"x\.tsv, line 3: rating='five' is no number; mend"):
        r.read_ratings(table(tmp_path / "x.tsv", "c1 ann t p m 4", "c1 ann t p m five"))
    with pytest.raises(ValueError, match="line 2: rating='nan' is no number"):
        r.read_ratings(table(tmp_path / "x.tsv", "c1 ann t p m nan"))
    with pytest.raises(ValueError, match="has no column 'score'"):
        r.read_ratings(table(tmp_path / "x.tsv"), "score")
    with pytest.raises(ValueError, match="line 3: a row of another length than the header's 6 fields"):
        r.read_ratings(table(tmp_path / "x.tsv", "c1 ann t p m 4", "c1"))
    (tmp_path / "y.tsv.gz").write_bytes(table(tmp_path / "x.tsv.gz", "c1 ann t p m 4").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"y\.tsv\.gz cannot be read"):
        r.read_ratings(tmp_path / "y.tsv.gz")
    marked = b"\xef\xbb\xbf" + table(tmp_path / "x.tsv", "c1 ann t p m 4").read_bytes()
    (tmp_path / "z.tsv").write_bytes(marked.replace(b"\n", b"\r\n"))
    assert r.read_ratings(tmp_path / "z.tsv") == {"ann": {("c1", "t", "p", "m"): 4.0}}
