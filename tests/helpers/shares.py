"""The order of a test run in several processes: what takes long begins at once, and no process ends alone.

`--dist worksteal` gives each process one contiguous share of the tests, of equal number; a process that has done its
own takes half of what another has left, from its end. So every share begins with files of long tests, which are then
seldom torn apart (what a file's tests share is made once), and ends with short ones.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_shares(tests: Sequence[T], processes: int, file: Callable[[T], str], long: Callable[[T], bool]) -> list[T]:
    """The tests, of which each file's stand together, with long files dealt out to the shares in turn."""
    files: dict[str, list[T]] = {}
    for test in tests:
        files.setdefault(file(test), []).append(test)
    first = [each for each in files.values() if any(map(long, each))]
    rest = [test for each in files.values() if not any(map(long, each)) for test in each]
    ordered: list[T] = []
    for number in range(processes):
        share = [test for each in first[number::processes] for test in each]
        size = (len(tests) - len(ordered)) // (processes - number)
        fill = max(0, size - len(share))
        ordered += share + rest[:fill]
        del rest[:fill]
    return ordered + rest
