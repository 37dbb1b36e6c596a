"""What is drafted of the next tokens, and when."""

import random

import pytest

from attnzoo.types import PLACE
from serve.config import EngineConfig
from serve.history import LEAST_MATCH, MOST_MATCH, PATIENCE, Drafts, History
from serve.speculation import REMEASURE, Speed, accepted


def told(*tokens: int) -> History:
    history = History()
    history.extend(tokens)
    return history


def slow_draft(tokens: list[int], most: int) -> list[int]:
    """`History.draft` by its definition, without an index: among all places."""
    best, place = LEAST_MATCH - 1, 0
    for at in range(LEAST_MATCH, len(tokens)):
        same = next(
            (n for n in range(min(MOST_MATCH, at)) if tokens[at - 1 - n] != tokens[-1 - n]), min(MOST_MATCH, at)
        )
        if same >= LEAST_MATCH and same >= best:
            best, place = same, at
    out: list[int] = []
    while place and len(out) < most:
        out.append((tokens + out)[place + len(out)])
    return out


def test_what_followed_the_same_tokens_is_drafted() -> None:
    assert told(1, 2, 3, 4, 5, 6, 1, 2, 3).draft(2) == [4, 5]
    assert told(1, 2, 3, 4, 5, 6, 7, 2, 3).draft(2) == []


def test_the_longest_agreement_wins_and_of_equal_ones_the_newest() -> None:
    assert told(9, 1, 2, 3, 10, 8, 1, 2, 3, 11, 9, 1, 2, 3).draft(1) == [10]
    assert told(7, 1, 2, 3, 10, 8, 1, 2, 3, 11, 9, 1, 2, 3).draft(1) == [11]


def test_a_repetition_goes_on() -> None:
    assert told(5, 5, 5, 5).draft(4) == [5, 5, 5, 5]
    assert told(1, 2, 3, 1, 2, 3).draft(7) == [1, 2, 3, 1, 2, 3, 1]


def test_embeddings_match_nothing_and_are_not_drafted() -> None:
    assert told(1, 2, 3, PLACE, 5, 1, 2, 3).draft(3) == []
    assert told(1, 2, 3, 4, PLACE, 5, 1, 2, 3).draft(3) == [4]
    assert told(PLACE, PLACE, PLACE, PLACE).draft(3) == []


def test_nothing_is_drafted_of_few_tokens_or_where_there_is_no_room() -> None:
    assert told().draft(4) == told(1).draft(4) == told(1, 1, 1).draft(4) == []
    assert told(1, 1, 1, 1).draft(0) == []


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_search_of_all_places_finds(seed: int) -> None:
    draw, history, tokens = random.Random(seed), History(), list[int]()
    for _ in range(60):
        tokens.append(draw.randrange(2 + seed % 3))
        history.extend(tokens[-1:])
        expected = slow_draft(tokens, 5)
        found = history.draft(5)
        # Only the newest places are compared.
        assert bool(found) == bool(expected)
        if len(tokens) < 12:
            assert found == expected, tokens


def test_tokens_stay_up_to_the_first_that_the_model_does_not_choose() -> None:
    assert accepted([1, 2, 3], [2, 3, 4]) == 3
    assert accepted([1, 2, 3], [2, 9, 4]) == 2
    assert accepted([1, 2, 3], [9, 3, 4]) == 1
    assert accepted([1], [9, 2, 2]) == 1
    assert accepted([1, 2], [None, 2]) == 1


def test_a_sequence_of_bad_drafts_is_drafted_no_more() -> None:
    good, bad = Drafts(), Drafts()
    for _ in range(PATIENCE):
        assert not bad.given_up
        bad.note(10, 2)
        good.note(10, 4)
    assert bad.given_up
    assert not good.given_up


def speed(plain_s: float, drafted_s: float) -> Speed:
    speed = Speed()
    assert not speed.pays(2, 16), "a plain step comes first"
    speed.measured(2, False, plain_s)
    assert speed.pays(2, 0.01), "a draft comes next, to be measured"
    speed.measured(2, True, drafted_s)
    return speed


def test_drafts_must_save_more_than_they_take() -> None:
    assert speed(1.0, 1.4).pays(2, 1.0)
    assert not speed(1.0, 1.6).pays(2, 1.0)


def test_either_kind_of_step_is_measured_anew() -> None:
    slow, fast = speed(1.0, 9.0), speed(1.0, 1.0)
    for _ in range(REMEASURE):
        assert not slow.pays(2, 1.0)
        slow.measured(2, False, 1.0)
    for _ in range(REMEASURE - 1):  # one was measured
        assert fast.pays(2, 1.0)
        fast.measured(2, True, 1.0)
    assert slow.pays(2, 1.0), "never tried again"
    assert not fast.pays(2, 1.0), "what a plain step takes is not measured again"


@pytest.mark.parametrize("most", [-1, 17])
def test_a_number_out_of_range_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match=f"prompt_lookup={most} must be between 0"):
        EngineConfig(checkpoint="none", prompt_lookup=most)
