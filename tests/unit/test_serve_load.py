"""The load that `attnzoo bench serve --streams` sends, and what it makes of the times."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from attnzoo.report import Report
from scripts.bench_serve import main
from scripts.serve_client import Target, Timing
from scripts.serve_load import Load, Side, measure_load, quantile_ms, read_side, rotated, summary
from tests.helpers.http_server import MODEL, running
from tests.helpers.serving import TOKENS

ROOT = Path(__file__).resolve().parents[2]


def test_sides_are_read():
    assert read_side("now") == Side("now")
    assert read_side("now threads=1 dtype=bfloat16") == Side("now", ("threads=1", "dtype=bfloat16"))
    assert read_side(f"old@{ROOT} threads=2") == Side("old", ("threads=2",), ROOT)
    assert read_side("other=http://127.0.0.1:81/a/b") == Side("other", target=Target("127.0.0.1", 81, "a/b"))


@pytest.mark.parametrize("words", ["", "a b", "a@/nowhere", "a=http://here/m", "a=http://h:1", "a=http://h:1/m x=1"])
def test_sides_that_are_none_are_refused(words):
    with pytest.raises(ValueError, match="--side"):
        read_side(words)


def test_quantiles():
    values = [value / 1000 for value in range(1, 101)]
    assert [quantile_ms(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert quantile_ms([0.5], 0.5) == 500.0


def test_a_summary_is_of_all_rounds():
    timings = [Timing(0.1 * turn, 0.01, "", (0.01, 0.02)) for turn in (1, 2, 3)]
    found = summary(timings, [4.0, 2.0, 5.0], new_tokens=20)
    assert (found["requests"], found["tokens/s"], found["best"]) == (3, 5.0, 10.0)
    assert (found["ttft p50 ms"], found["tpot p50 ms"], found["gap p99 ms"]) == (200.0, 10.0, 20.0)


def test_every_side_is_the_first_of_as_many_turns():
    turns = [rotated(["a", "b", "c"], turn) for turn in range(6)]
    assert [turn[0] for turn in turns] == list("abcabc")
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)


def test_servers_take_turns_and_are_compared():
    with running() as (first, owner), running() as (second, _):
        sides = [
            Side(name, target=Target("127.0.0.1", urlsplit(url).port, MODEL))
            for name, url in (("a", first), ("b", second))
        ]
        report = Report.start(command=["bench"])
        load = Load(streams=(1, 3), requests=2, rounds=2, prompt_tokens=9, new_tokens=5, sampled=True, logprobs=1)
        measure_load(Path("none"), sides, load, TOKENS, report)
        assert not owner._streams
    assert [(row["streams"], row["side"], row["requests"]) for row in report.rows] == [
        (1, "a", 4), (1, "b", 4), (3, "a", 12), (3, "b", 12)
    ]  # fmt: skip
    for row in report.rows:
        assert row["tokens/s"] > 0
        assert row["best"] >= row["tokens/s"]
        assert row["ttft p99 ms"] >= row["ttft p50 ms"] > 0
    assert report.rows[0]["times the first"] == 1
    assert report.rows[1]["times the first"] == pytest.approx(
        report.rows[1]["tokens/s"] / report.rows[0]["tokens/s"], abs=1e-3
    )


def test_an_answer_that_is_an_error_is_told():
    with running() as (url, _):
        side = Side("a", target=Target("127.0.0.1", urlsplit(url).port, "other"))
        with pytest.raises(RuntimeError, match="the server answered"):
            measure_load(Path("none"), [side], Load(streams=(1,)), TOKENS, Report.start(command=["bench"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streams", "0"], "--streams"),
        (["--streams", "1", "--rounds", "0"], "--rounds 0"),
        (["--side", "a"], "--side needs --streams"),
        (["--streams", "1", "--side", "a", "--side", "a"], "two sides have the same name"),
    ],
)
def test_refused(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
