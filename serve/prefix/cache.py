"""Which beginnings of prompts are kept, and how far a prompt may begin from what is kept.

Only exact state is kept, as it is before a policy compresses: all policies share keys and values, and those that learn
what they need from the last tokens of a prompt (`CachePolicy.resumes`) share all of it. Others, which sum attention
over the whole prompt, have sums of their own beside the shared keys and values.
"""

import secrets
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models import DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from attnzoo.models.embedded import EmbeddedPrompt
from serve.pools.parts import cell_of, others, rest_of, restored
from serve.prefix.grid import cut, digests
from serve.prefix.tree import PrefixNode, PrefixTree

EXACT = "exact"
CHEAP = 8
"""What is kept besides keys and values is kept at every border where it is less than this part of them."""


@dataclass(eq=False)
class PrefixPlan:
    """What may be reused of one prompt. borders: ends of its cells; keys: a digest of each, none where nothing can be
    reused or kept; why_not: why nothing can be reused. kind: of the rests that it takes and gives; names: of their
    tensors. latest: the last place from which the prompt may go on. wanted: borders at which the rest is kept, whatever
    it takes.

    reused: tokens that were copied so far. node: the cell before the next one, None: there is none. found: cells that
    are to be copied, by their ends."""

    borders: tuple[int, ...]
    keys: tuple[bytes, ...] = ()
    why_not: str | None = None
    kind: str = EXACT
    names: Collection[str] = ()
    latest: int = 0
    wanted: frozenset[int] = frozenset()
    reused: int = 0
    node: PrefixNode | None = None
    found: dict[int, PrefixNode] = field(default_factory=dict)


class PrefixCache:
    """budget: bytes; 0: nothing is kept, and prompts are cut as ever. cell: tokens of a cell. ends: tokens that end a
    turn. Two prompts share nothing unless they have the same salt."""

    def __init__(self, model: DecoderLM, budget: int, cell: int, ends: Collection[int]) -> None:
        self.model, self.cell, self.ends = model, cell, frozenset(ends)
        self.tree = PrefixTree(budget)
        self.plans: dict[str, PrefixPlan] = {}
        """Of each request, from `add` to `remove`."""
        self.queried = self.reused = 0
        """Tokens of prompts that were looked up, and of them those that were copied."""
        self._salt = secrets.token_bytes(32)
        self._exact = frozenset(others(model.init_state(1, 1, device="meta")))

    def borders(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Where a prompt is cut."""
        return cut(prompt, self.ends, self.cell)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        borders: tuple[int, ...],
        choice: CacheChoice,
        *,
        whole: str | None = None,
    ) -> None:
        """Notes what may be reused of a request's prompt. whole: why nothing may be."""
        self.plans[request_id] = self._plan(prompt, borders, choice, whole)

    def begin_again(self, request_id: str) -> None:
        """The prompt of a request is read once more from its beginning."""
        plan = self.plans[request_id]
        plan.reused, plan.node, plan.found = 0, None, {}

    def remove(self, request_id: str) -> None:
        """Forgets the plan of a request; what its prompt has made known stays."""
        self.plans.pop(request_id, None)

    def _plan(
        self, prompt: Sequence[int], borders: tuple[int, ...], choice: CacheChoice, whole: str | None
    ) -> PrefixPlan:
        policy = None if choice.exact else choice.build()
        resumes = 0 if policy is None else policy.resumes
        latest = len(prompt) - max(1, resumes or 0)
        why_not = None
        if not self.tree.budget:
            why_not = "this server keeps no beginnings of prompts (prefix_mib=0)"
        elif whole is not None:
            why_not = whole
        elif isinstance(prompt, EmbeddedPrompt):
            why_not = "the prompt holds embeddings"
        elif policy is not None and policy.prefill == "stream":
            why_not = f"{policy.describe()} compresses a prompt while it is read"
        if why_not is not None:
            return PrefixPlan(borders, why_not=why_not)
        if latest < borders[0]:  # others may still begin as this one
            why_not = f"its first {borders[0]} tokens are not followed by enough others"
        keys = digests(prompt, borders, self._salt)
        kind, names = EXACT, self._exact
        if policy is not None and policy.resumes is None:
            kind = policy.describe()
            names = frozenset(others(self.model.init_state(1, 1, device="meta", cache=policy)))
        self.queried += len(prompt)
        return PrefixPlan(borders, keys, why_not, kind, names, latest, self._wanted(borders, keys))

    def _wanted(self, borders: tuple[int, ...], keys: tuple[bytes, ...]) -> frozenset[int]:
        """Ends of turns, the last border that another turn can go on from, and where this prompt leaves the others."""
        before = (0, *borders[:-1])
        turns = {end for start, end in zip(before, borders, strict=True) if end - start < self.cell}
        branch = self.tree.seen(keys)
        return frozenset((*turns, *borders[-2:-1], *borders[max(0, branch - 1) : branch]))

    def reach(self, request_id: str, at: int) -> int:
        """The furthest place from which a prompt that was read up to `at` may go on; `at` where there is none."""
        plan = self.plans[request_id]
        if not plan.keys:
            return at
        nodes = self.tree.path(plan.keys)
        ends = [node.end for node in nodes if at < node.end <= plan.latest and plan.kind in node.rests]
        further = max(ends, default=at)
        plan.found = {node.end: node for node in nodes if at < node.end <= further}
        return further

    def claim(self, request_id: str, at: int) -> Hashable:
        """What a prompt computes next that others may wait for; None: nothing."""
        plan = self.plans[request_id]
        if not plan.keys or at not in (0, *plan.borders):
            return None
        index = 0 if at == 0 else plan.borders.index(at) + 1
        if index < len(self.tree.path(plan.keys)):
            # The keys and values of the next cell are known, and its rest is not kept: the next that will be counts.
            ahead = range(index, len(plan.keys) - 1)
            index = next((i for i in ahead if plan.borders[i] in plan.wanted), index)
        # Of the last cell nobody else can know more than this prompt itself.
        return (plan.keys[index], plan.kind) if index < len(plan.keys) - 1 else None

    def restore(self, request_id: str, state: DecoderState, start: int, tokens: int) -> DecoderState:
        """A state of one sequence of `start` tokens, continued to `tokens`, which `reach` has found."""
        plan = self.plans[request_id]
        nodes, node = [each for _, each in sorted(plan.found.items())], plan.found[tokens]
        plan.found = {}  # what leaves the tree must leave memory
        self.tree.use(nodes)
        state = restored(state, [each.keys_values for each in nodes], node.rests[plan.kind], start, tokens)
        plan.node, plan.reused = node, plan.reused + tokens - start
        self.reused += tokens - start
        return state

    def keep(self, request_id: str, state: DecoderState, start: int, end: int) -> None:
        """Keeps a cell that was computed. state: of its sequence, exact, up to `end`."""
        plan = self.plans[request_id]
        follows = start == 0 or (plan.node is not None and plan.node.end == start and self.tree.has(plan.node))
        # A cell that the end of the prompt has cut is of no other prompt.
        cut_short = end == plan.borders[-1] and end - start < self.cell
        if not plan.keys or not follows or end not in plan.borders or cut_short:
            plan.node = None
            return
        index = plan.borders.index(end)
        before = None if start == 0 else plan.node
        rest = rest_of(state, end, plan.names)
        cell = cell_of(state, start, end)
        cheap = CHEAP * sum(x.nbytes for x in rest.values()) <= sum(x.nbytes for x in cell)
        rests = {}
        if cheap or end in plan.wanted:
            rests[plan.kind] = {name: x.clone() for name, x in rest.items()}
        cost = self.model.cost(1, end - start, end).flops
        plan.node = self.tree.put(plan.keys[index], before, end, cell, rests, cost)

    def counts(self) -> tuple[int, int, int, int]:
        """Tokens that were looked up, and that were copied; bytes that are kept; cells that left for room."""
        return self.queried, self.reused, self.tree.nbytes, self.tree.evicted

    def remove_keys(self, request_id: str) -> None:
        """Nothing more of a request's prompt is kept or reused."""
        self.plans[request_id].keys = ()

    def clear(self) -> None:
        """Forgets all beginnings and plans."""
        self.tree.clear()
        self.plans.clear()
