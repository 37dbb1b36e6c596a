"""Continuous batching, planned with integers: which sequences run in the next step, and how many tokens each.

Every sequence that decodes gets its token in every step, so prompts never starve it; what is left of the token budget
goes to prompts, first come first served, in chunks. A prompt that does not fit the budget is continued in the next
step, before any other starts; so at most one prompt is unfinished between steps.

Sequences decode together that keep their past in the same way: each such group has slots of its own.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from serve.cache_manager import Release, SlotTable

Group = Hashable
"""What sequences that decode together have in common."""


class QueueFullError(Exception):
    """No room for another request; the client should come back later."""


@dataclass(frozen=True)
class Demand:
    """What a sequence takes of the device: slots of its `group`, `row_bytes` for the time it decodes, and
    `prompt_bytes` while its prompt is read."""

    group: Group = None
    row_bytes: int = 0
    prompt_bytes: int = 0

    @property
    def most(self) -> int:
        """Bytes that the sequence needs when it is alone: at the end of its prompt there are both."""
        return self.row_bytes + self.prompt_bytes


@dataclass(frozen=True)
class Chunk:
    """`count` prompt tokens from `start` on of the sequence in `slot` of `group`; `last`: the prompt ends with them."""

    request_id: str
    group: Group
    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Plan:
    """One step: sequences that decode, by group (the one at index i is in slot i of it), then chunks of prompts."""

    decode: tuple[tuple[Group, tuple[str, ...]], ...]
    prefill: tuple[Chunk, ...]

    @property
    def decoding(self) -> list[str]:
        """All sequences that decode, in order."""
        return [request_id for _, ids in self.decode for request_id in ids]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.decoding) + sum(chunk.count for chunk in self.prefill)

    @property
    def sampled(self) -> list[str]:
        """Sequences that get a new token, in the order of the runner's logits."""
        return [*self.decoding, *(chunk.request_id for chunk in self.prefill if chunk.last)]


class Scheduler:
    """Admits, plans and releases. `max_queue`: how many requests may wait while all slots are taken. `max_groups`,
    `max_bytes`: groups that may run at the same time, and bytes that their demands may sum up to (None: no limit).

    Raises ValueError for limits under which prompts could not advance.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_queue: int,
        *,
        max_groups: int = 1,
        max_bytes: int | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_queue < 0:
            raise ValueError(f"max_num_seqs={max_num_seqs} must be at least 1, max_queue={max_queue} at least 0")
        if max_batched_tokens <= max_num_seqs:
            raise ValueError(
                f"max_batched_tokens={max_batched_tokens} must be larger than max_num_seqs={max_num_seqs}: "
                "when all slots decode, prompts need what is left"
            )
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.max_queue = max_queue
        self.max_groups = max_groups
        self.max_bytes = max_bytes
        self.tables: dict[Group, SlotTable] = {}
        self._waiting: deque[str] = deque()
        self._prompt: dict[str, int] = {}
        self._demand: dict[str, Demand] = {}
        self._planned: dict[str, int] = {}
        self._row_bytes: dict[Group, int] = {}

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._planned)

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._prompt)

    def add(self, request_id: str, prompt_tokens: int, demand: Demand | None = None) -> None:
        """Queues a request. Raises QueueFullError when the queue is full, ValueError for a used id, no tokens, or a
        demand that never fits."""
        demand = demand or Demand()
        if request_id in self._prompt:
            raise ValueError(f"request id {request_id!r} is in use; give every request its own")
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        if self.max_bytes is not None and demand.most > self.max_bytes:
            raise ValueError(f"the request needs {demand.most} bytes, more than the {self.max_bytes} there are")
        if len(self._prompt) >= self.max_num_seqs + self.max_queue:
            raise QueueFullError(f"{self.num_running} requests are running and {self.num_waiting} waiting")
        self._waiting.append(request_id)
        self._prompt[request_id] = prompt_tokens
        self._demand[request_id] = demand

    def schedule(self) -> Plan:
        """The next step. The caller must run it: its tokens count as done from now on."""
        decode = tuple((group, tuple(t.ids[: t.decoding])) for group, t in self.tables.items() if t.decoding)
        budget = self.max_batched_tokens - sum(len(ids) for _, ids in decode)
        chunks: list[Chunk] = []
        for table in self.tables.values():
            for request_id in table.ids[table.decoding :]:
                chunks.append(self._chunk(request_id, budget))
                budget -= chunks[-1].count
        while budget > 0 and self._waiting and self._fits(self._waiting[0]):
            request_id = self._waiting.popleft()
            group = self._demand[request_id].group
            self.tables.setdefault(group, SlotTable(self.max_num_seqs)).take(request_id)
            self._planned[request_id] = 0
            chunks.append(self._chunk(request_id, budget))
            budget -= chunks[-1].count
        for chunk in chunks:
            self.tables[chunk.group].decoding += chunk.last
        return Plan(decode, tuple(chunks))

    def measured(self, group: Group, row_bytes: int) -> None:
        """What a row of a running group really takes, where that is more than was asked for."""
        self._row_bytes[group] = row_bytes

    def _fits(self, request_id: str) -> bool:
        """Whether the request may run beside those that do. The first that waits is never overtaken."""
        group = self._demand[request_id].group
        if self.num_running == self.max_num_seqs:
            return False
        if group not in self.tables and len(self.tables) >= self.max_groups:
            return False
        return self.max_bytes is None or self._bytes(request_id) <= self.max_bytes

    def _bytes(self, request_id: str) -> int:
        """Bytes once the request runs too: all rows of a group are as large as its largest, and prompts are read one
        after the other."""
        rows: dict[Group, int] = {}
        largest = dict(self._row_bytes)
        prompt_bytes = 0
        for running in (*self._planned, request_id):
            demand = self._demand[running]
            rows[demand.group] = rows.get(demand.group, 0) + 1
            largest[demand.group] = max(largest.get(demand.group, 0), demand.row_bytes)
            if self._planned.get(running, 0) < self._prompt[running]:
                prompt_bytes = max(prompt_bytes, demand.prompt_bytes)
        return prompt_bytes + sum(count * largest[group] for group, count in rows.items())

    def _chunk(self, request_id: str, budget: int) -> Chunk:
        group = self._demand[request_id].group
        start, total = self._planned[request_id], self._prompt[request_id]
        count = min(budget, total - start)
        self._planned[request_id] += count
        slot = self.tables[group].slot_of(request_id)
        return Chunk(request_id, group, slot, start, count, last=start + count == total)

    def finish(self, request_id: str) -> Release | None:
        """Removes a request, finished or aborted. Returns what its slot needs, None when it had none.

        Raises KeyError for an unknown id.
        """
        del self._prompt[request_id]
        group = self._demand.pop(request_id).group
        if self._planned.pop(request_id, None) is None:
            self._waiting.remove(request_id)
            return None
        release = self.tables[group].release(request_id)
        if not self.tables[group]:
            del self.tables[group]
            self._row_bytes.pop(group, None)
        return release
