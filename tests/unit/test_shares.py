"""The order of tests in several processes."""

import pytest

from tests.helpers.shares import Kind, in_shares

SIZES = {"a": 40, "ranks": 7, "c": 90, "long": 3, "e": 1, "servers": 5, "longer": 2, "h": 60, "ray": 11, "kernels": 6}
KINDS = dict.fromkeys(("ranks", "servers", "ray"), Kind.STARTS_PROCESSES) | dict.fromkeys(
    ("long", "longer", "kernels"), Kind.LONG
)


def kind(test):
    """Of a file's tests the second one tells."""
    name, number = test
    return KINDS.get(name, Kind.SHORT) if number == 1 else Kind.SHORT


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_share_begins_with_long_files_and_none_is_torn(processes):
    tests = [(name, number) for name, size in SIZES.items() for number in range(size)]
    ordered = in_shares(tests, processes, lambda test: test[0], kind)
    assert sorted(ordered) == sorted(tests)
    left, shares = list(ordered), []
    for number in range(processes):  # as xdist cuts them
        size = len(left) // (processes - number)
        shares.append(left[:size])
        del left[:size]
    for share in shares:
        long = [name in KINDS for name, _ in share]
        assert long == sorted(long, reverse=True)
        assert any(long)
        for name in {name for name, _ in share if name in KINDS}:
            assert [number for other, number in share if other == name] == list(range(SIZES[name]))
    starting = [any(KINDS.get(name) == Kind.STARTS_PROCESSES for name, _ in share) for share in shares]
    assert starting == [number < (processes + 1) // 2 for number in range(processes)]
