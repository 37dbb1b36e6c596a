"""Every registered variant still computes the numbers it was entered with."""

import json

from scripts.golden import PATH, all_golden, compare


def test_golden_numbers():
    stored = json.loads(PATH.read_text(encoding="utf-8"))
    assert compare(stored["values"], all_golden(), stored["tolerance"]) == []


def test_a_moved_number_is_noticed():
    stored = json.loads(PATH.read_text(encoding="utf-8"))
    moved = {name: [*values[:-1], values[-1] + 1e-9] for name, values in all_golden().items()}
    assert len(compare(stored["values"], moved, stored["tolerance"])) == len(moved)
