"""The order of a test run in several processes: what takes long begins at once, and no process ends alone.

`--dist worksteal` gives each process one contiguous share of the tests, of equal number; a process that has done its
own takes half of what another has left, from its end. So every share begins with files of long tests, which are then
seldom torn apart (what a file's tests share is made once), and ends with short ones. Files whose tests start processes
(ranks, servers) go to half of the shares, so that they meet each other rarely.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TypeVar

T = TypeVar("T")


class Kind(IntEnum):
    """What a test costs; a file is what its dearest test is."""

    STARTS_PROCESSES = 0
    LONG = 1
    SHORT = 2


def in_shares(tests: Sequence[T], processes: int, file: Callable[[T], str], kind: Callable[[T], Kind]) -> list[T]:
    """The tests, of which each file's stand together, in shares as xdist cuts them."""
    files: dict[str, list[T]] = {}
    for test in tests:
        files.setdefault(file(test), []).append(test)
    kinds: dict[Kind, list[list[T]]] = {each: [] for each in Kind}
    for each in files.values():
        kinds[min(map(kind, each))].append(each)
    half = (processes + 1) // 2
    shares: list[list[T]] = [[] for _ in range(processes)]
    for number, each in enumerate(kinds[Kind.STARTS_PROCESSES]):
        shares[number % half] += each
    for number, each in enumerate(kinds[Kind.LONG]):
        shares[-1 - number % max(1, processes - half)] += each
    short = [test for each in kinds[Kind.SHORT] for test in each]
    ordered: list[T] = []
    for number, share in enumerate(shares):
        size = (len(tests) - len(ordered)) // (processes - number)
        fill = max(0, size - len(share))
        ordered += share + short[:fill]
        del short[:fill]
    return ordered + short
