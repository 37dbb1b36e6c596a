"""What is kept of beginnings of prompts, in a tree of their cells, within a budget of bytes.

A node is one cell after all those before it. It holds the keys and values of its own tokens, and, for each kind of
state, what else there is at its end (`rests`). Of cells that are not kept it is known that they have been seen, for a
while. Nodes leave in the order of GreedyDual-Size (Cao and Irani 1997): what was used long ago and costs
little to compute for its bytes goes first, and never before what follows it.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

MOST_KNOWN = 65_536
"""Most cells that are known and not kept."""
OVERHEAD = 2048
"""Bytes of a node besides its tensors, about."""


@dataclass(eq=False)
class PrefixNode:
    """end: tokens up to its end. keys_values: of its tokens. cost: what computing them took, in any unit. rests: by
    kind of state, tensors by name. worth: by which it stays. following: nodes after it."""

    key: bytes
    before: "PrefixNode | None"
    end: int
    keys_values: list[Tensor]
    cost: float
    rests: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    worth: float = 0.0
    following: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds, itself included."""
        return OVERHEAD + sum(x.nbytes for x in self.keys_values) + sum(map(_bytes, self.rests.values()))


class PrefixTree:
    """At most `budget` bytes, `lent` ones included. nbytes: of its nodes. evicted: how many have left for room."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.lent = 0
        self.evicted = 0
        self._nodes: dict[bytes, PrefixNode] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._floor = 0.0

    def __len__(self) -> int:
        return len(self._nodes)

    def path(self, keys: Sequence[bytes]) -> list[PrefixNode]:
        """The nodes of these cells, as far as they are kept."""
        found: list[PrefixNode] = []
        for key in keys:
            node = self._nodes.get(key)
            if node is None:
                break
            found.append(node)
        return found

    def use(self, nodes: Sequence[PrefixNode]) -> None:
        """Notes that nodes have been of use."""
        for node in nodes:
            node.worth = self._worth(node)
            if self.has(node):  # of those worth as much, what was used last stays
                self._nodes[node.key] = self._nodes.pop(node.key)

    def _worth(self, node: PrefixNode) -> float:
        return self._floor + node.cost / node.nbytes

    def has(self, node: PrefixNode) -> bool:
        """Whether a node is still kept."""
        return self._nodes.get(node.key) is node

    def seen(self, keys: Sequence[bytes]) -> int:
        """How many of these cells, from the first on, have been seen before; all of them are known from now on."""
        count = next((n for n, key in enumerate(keys) if key not in self._nodes and key not in self._known), len(keys))
        for key in keys:
            if key not in self._nodes:
                self._known[key] = None
                self._known.move_to_end(key)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return count

    def put(
        self,
        key: bytes,
        before: PrefixNode | None,
        end: int,
        keys_values: list[Tensor],
        rests: Mapping[str, dict[str, Tensor]],
        cost: float,
    ) -> PrefixNode | None:
        """Keeps a cell after `before`, or adds to one that is kept. None where there is no room for it."""
        node = self._nodes.get(key)
        if node is None:
            node = PrefixNode(key, before, end, keys_values, cost)
        added = {kind: rest for kind, rest in rests.items() if kind not in node.rests}
        new = key not in self._nodes
        size = sum(map(_bytes, added.values())) + (node.nbytes if new else 0)
        if not self._make_room(size, node):
            return None
        node.rests.update(added)
        node.worth = self._worth(node)
        self.nbytes += size
        if new:
            self._nodes[key] = node
            self._known.pop(key, None)
            if before is not None:
                before.following += 1
        return node

    def lend(self, nbytes: int) -> bool:
        """Gives so many bytes of the budget to something else, until `take_back`, if nodes can make room for it."""
        if not self._make_room(nbytes, None):
            return False
        self.lent += nbytes
        return True

    def take_back(self, nbytes: int) -> None:
        """Ends what `lend` has begun."""
        self.lent -= nbytes

    def _make_room(self, size: int, kept: PrefixNode | None) -> bool:
        if self.lent + size > self.budget:
            return False
        while self.nbytes + self.lent + size > self.budget:
            way = {id(node) for node in _way(kept)}
            free = [node for node in self._nodes.values() if not node.following and id(node) not in way]
            if not free:
                return False
            least = min(free, key=lambda node: node.worth)
            self._floor = max(self._floor, least.worth)
            self._remove(least)
            self.evicted += 1
        return True

    def _remove(self, node: PrefixNode) -> None:
        del self._nodes[node.key]
        self.nbytes -= node.nbytes
        if node.before is not None:
            node.before.following -= 1
        self._known[node.key] = None

    def clear(self) -> None:
        """Forgets everything."""
        self._nodes.clear()
        self._known.clear()
        self.nbytes = self.lent = 0


def _bytes(rest: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in rest.values())


def _way(node: PrefixNode | None) -> list[PrefixNode]:
    """A node and all before it."""
    found = []
    while node is not None:
        found.append(node)
        node = node.before
    return found
