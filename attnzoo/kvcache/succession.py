"""Which states may still be continued.

`extend` writes into the buffers of the state that it is given, so that a state and the one that follows it share
memory. A state may be continued once more from where it was, for example after a guess that was wrong, as long as
nothing that it needs has been written over; what followed it before is then lost. Each state keeps a claim on its
memory, which says so: a continuation of a state whose claim is gone would read keys of other tokens.

Views of some rows or slots (`State.rows`, `State.cut`) keep no claim: who writes through them, as a server does, says
himself what they hold.
"""

from typing import Any, Final, TypeVar

S = TypeVar("S")


class MemoryClaim:
    """A state's claim on the memory that it shares with the states before and after it.

    lost: another continuation has written over the memory. successor: the claim of the state that `extend` has written
    into this state's memory, if it has.
    """

    __slots__ = ("lost", "successor")

    def __init__(self) -> None:
        self.lost = False
        self.successor: MemoryClaim | None = None


NO_CLAIM: Final = MemoryClaim()
"""What views have in place of a claim."""


def check_current(state: Any) -> None:
    """Raises ValueError for a state whose memory holds another continuation by now."""
    claim = state._claim
    if claim is None or claim is NO_CLAIM:
        return
    if claim.lost:
        raise ValueError(
            "state: the state before it has been continued a second time, and that has written over what this state "
            "holds; to continue a state in two ways, take state.clone() for one of them before"
        )
    if claim.successor is not None and not state.rewinds:
        raise ValueError(
            "state: it has been continued already, and what it held has been replaced by newer tokens (a window, or a "
            "cache that evicts or counts attention); continue the state that extend returned, or take state.clone() "
            "before"
        )


def succeed(before: Any, after: Any) -> None:
    """Notes that `extend` has made `after` of `before`: where both are in the same memory, what followed `before` until
    now is lost."""
    claim = before._claim
    if claim is NO_CLAIM or after is before or not before.shares(after):
        return
    if claim is None:
        claim = before._claim = MemoryClaim()
    gone = claim.successor
    while gone is not None:
        gone.lost, gone = True, gone.successor
    claim.successor = after._claim = MemoryClaim()
