"""Every registered variant still computes the numbers it was entered with."""

import copy

import pytest

from scripts.golden import all_golden, bound, moved, read_stored, stored_values, updated


@pytest.fixture(scope="module")
def fresh() -> dict[str, list[float]]:
    return all_golden()


def test_golden_numbers(fresh):
    assert moved(stored_values(read_stored()), fresh) == {}


def test_a_moved_number_is_noticed(fresh):
    changed = {name: [*values[:-1], values[-1] * (1 + 1e-9)] for name, values in fresh.items()}
    assert moved(stored_values(read_stored()), changed).keys() == fresh.keys()


def test_a_large_number_may_move_by_its_rounding(fresh):
    name = "in_context_linear"
    assert max(map(abs, fresh[name])) > 1000
    other_order = [value * (1 + 4e-16) for value in fresh[name]]
    assert moved({name: fresh[name]}, {name: other_order}) == {}
    assert bound(name, fresh[name]) < 1e-9


def test_writing_leaves_what_did_not_move_alone(fresh):
    content = read_stored()
    rounded = {name: [value * (1 + 2e-16) for value in values] for name, values in fresh.items()}
    assert updated(content, rounded, {"commit": "new"}) == content
    other = copy.deepcopy(content)
    other["cases"]["mdha"]["values"][0] += 1.0
    written = updated(other, rounded, {"commit": "new"})
    assert written["cases"]["mdha"]["values"] == rounded["mdha"]
    assert written["runs"][written["cases"]["mdha"]["run"]] == {"commit": "new"}
    assert all(written["cases"][name] == content["cases"][name] for name in fresh if name != "mdha")
