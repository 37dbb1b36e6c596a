"""The order of tests in several processes."""

import pytest

from tests.helpers.shares import in_shares


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_share_begins_with_long_files_and_none_is_torn(processes):
    sizes = {"a": 40, "LONG-b": 7, "c": 90, "LONG-d": 3, "e": 1, "LONG-f": 5, "LONG-g": 2, "h": 60, "LONG-i": 11}
    tests = [(name, number) for name, size in sizes.items() for number in range(size)]
    ordered = in_shares(
        tests, processes, lambda test: test[0], lambda test: test[0].startswith("LONG") and test[1] == 1
    )
    assert sorted(ordered) == sorted(tests)
    left, shares = list(ordered), []
    for number in range(processes):  # as xdist cuts them
        size = len(left) // (processes - number)
        shares.append(left[:size])
        del left[:size]
    for share in shares:
        long = [name.startswith("LONG") for name, _ in share]
        assert long == sorted(long, reverse=True)
        for name in {name for name, _ in share if name.startswith("LONG")}:
            assert [number for other, number in share if other == name] == list(range(sizes[name]))
