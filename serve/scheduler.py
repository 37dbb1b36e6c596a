"""Continuous batching, planned with integers: which sequences run in the next step, and with how many tokens each.

Every decoding sequence gets a token in every step. The rest of the token budget goes to prompts, in chunks. While any
sequence decodes, the caller may limit the prompt tokens of a step, so that streams do not wait long for their tokens.

The prompt with the fewest unread tokens comes first, so that a short prompt overtakes a long one, even one that has
begun. Time is counted in tokens that went through the model. A prompt is overdue when it has waited `PATIENCE` times
the sum of its unread tokens and a full step. Half of a step's prompt tokens go to overdue prompts in order of arrival.
So every prompt is read eventually, and a short one waits only a few steps.

Sequences with the same cache form a group, decode together, and have slots of their own. While a request waits for a
group or for memory, others may start before it; once it is overdue, no request may start that would delay it further.
The default group never waits for other groups.
"""

from bisect import bisect_right
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.slots import Release, SlotTable

Group = Hashable
"""The common property of sequences that decode together: their cache."""
PATIENCE = 4
"""A prompt is overdue after waiting so many times the sum of its unread tokens and a full step, in tokens."""


class QueueFullError(Exception):
    """The queue is full; the client should try again later."""


@dataclass(frozen=True)
class Demand:
    """Memory of a sequence in its `group`: `row_bytes` while it decodes, as much as the largest row of the group takes,
    `prompt_bytes` while its prompt is read, and `own_bytes`, whatever others take, from its beginning to its end."""

    group: Group = None
    row_bytes: int = 0
    prompt_bytes: int = 0
    own_bytes: int = 0

    @property
    def most(self) -> int:
        """Most bytes that the sequence takes: at the end of its prompt it takes all of them."""
        return self.row_bytes + self.prompt_bytes + self.own_bytes


@dataclass(frozen=True)
class Chunk:
    """`count` prompt tokens, from `start` on, of the sequence in `slot` of `group`. last: the prompt ends with them."""

    request_id: str
    group: Group
    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Reuse:
    """The prompt of the sequence in `slot` of `group`, of which `start` tokens were read, goes on from the `end`-th:
    what lies between is copied."""

    request_id: str
    group: Group
    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Exchange:
    """Exchanges the sequences in two slots of a group."""

    group: Group
    slots: tuple[int, int]


@dataclass(frozen=True)
class StepPlan:
    """One step: first exchanges of slots, then decoding sequences by group (index i is in slot i of its group), then
    chunks of prompts, those of prompts that end first, and of each in order. What is reused of a prompt is copied
    before its first chunk, and not earlier, since its memory counts from then on."""

    decode: tuple[tuple[Group, tuple[str, ...]], ...]
    prefill: tuple[Chunk, ...]
    exchanges: tuple[Exchange, ...] = ()
    reused: tuple[Reuse, ...] = ()

    @property
    def decoding(self) -> list[str]:
        """All decoding sequences, in order."""
        return [request_id for _, ids in self.decode for request_id in ids]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that go through the model."""
        return len(self.decoding) + sum(chunk.count for chunk in self.prefill)

    @property
    def sampled(self) -> list[str]:
        """Sequences that get a new token, in the order of the runner's logits."""
        return [*self.decoding, *(chunk.request_id for chunk in self.prefill if chunk.last)]


class Prefixes(Protocol):
    """What is known of beginnings of prompts that were read before."""

    def reach(self, request_id: str, at: int) -> int:
        """From where a prompt of which `at` tokens were read may go on; `at` where nothing more is known."""

    def claim(self, request_id: str, at: int) -> Hashable:
        """What its next tokens will make known, which others wait for; None: nothing."""


class NoPrefixes:
    """Where nothing is reused."""

    def reach(self, request_id: str, at: int) -> int:
        """`at`."""
        return at

    def claim(self, request_id: str, at: int) -> None:
        """None."""


class Scheduler:
    """Queues requests, plans steps, and assigns slots. max_num_seqs: slots, over all groups. max_batched_tokens: most
    tokens of a step. max_queue: requests that may wait while all slots are taken. max_groups: groups besides
    `default_group` that may run at the same time. max_bytes: limit of the sum of the demands (None: no limit).
    prefixes: what beginnings of prompts need not be read again.

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
        default_group: Group = None,
        prefixes: Prefixes | None = None,
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
        self.default_group = default_group
        self._prefixes = prefixes or NoPrefixes()
        self.tables: dict[Group, SlotTable] = {}
        self.clock = 0
        self._waiting: dict[str, None] = {}
        self._arrival: dict[str, int] = {}
        """The clock at the arrival of each unfinished request, in order of arrival."""
        self._prompt: dict[str, int] = {}
        self._borders: dict[str, Sequence[int]] = {}
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

    def add(
        self, request_id: str, prompt_tokens: int, demand: Demand | None = None, borders: Sequence[int] = ()
    ) -> None:
        """Queues a request. borders: where chunks of its prompt must end, ascending, the prompt's own end included;
        without, they end anywhere. Raises QueueFullError if the queue is full, ValueError for an id in use, an empty
        prompt or a demand larger than max_bytes."""
        demand = demand or Demand(self.default_group)
        if request_id in self._prompt:
            raise ValueError(f"request id {request_id!r} is in use; give every request its own")
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        if self.max_bytes is not None and demand.most > self.max_bytes:
            raise ValueError(f"the request needs {demand.most} bytes, more than the {self.max_bytes} there are")
        if len(self._prompt) >= self.max_num_seqs + self.max_queue:
            raise QueueFullError(f"{self.num_running} requests are running and {self.num_waiting} waiting")
        self._prompt[request_id] = prompt_tokens
        self._borders[request_id] = borders
        self._demand[request_id] = demand
        self._arrival[request_id] = self.clock
        self._waiting[request_id] = None

    def schedule(self, prompt_tokens: int | None = None) -> StepPlan:
        """Plans the next step. The caller must run it: its tokens count as read from now on.

        prompt_tokens: most prompt tokens in the step if any sequence decodes (at least one is read); None: as many as
        max_batched_tokens allows.
        """
        decode = tuple((group, tuple(t.ids[: t.decoding])) for group, t in self.tables.items() if t.decoding)
        decoding = sum(len(ids) for _, ids in decode)
        budget = self.max_batched_tokens - decoding
        if decoding and prompt_tokens is not None:
            budget = min(budget, max(1, prompt_tokens))
        reused: dict[str, tuple[int, int]] = {}
        counts = self._share(budget, reused)
        plan = self._placed(decode, counts, reused)
        for request_id, count in counts.items():
            self._planned[request_id] += count
        self.clock += plan.num_tokens
        return plan

    def measured(self, group: Group, row_bytes: int) -> None:
        """Records the measured bytes of a row in a running group, which may be more than the demand."""
        self._row_bytes[group] = row_bytes

    def finish(self, request_id: str) -> Release | None:
        """Removes a finished or aborted request. Returns how its slot is released, None if it had none.

        Raises KeyError for an unknown id.
        """
        del self._prompt[request_id], self._borders[request_id], self._arrival[request_id]
        group = self._demand.pop(request_id).group
        if self._planned.pop(request_id, None) is None:
            del self._waiting[request_id]
            return None
        release = self.tables[group].release(request_id)
        if not self.tables[group]:
            del self.tables[group]
            self._row_bytes.pop(group, None)
        return release

    def _left(self, request_id: str) -> int:
        """Number of prompt tokens that have not been read."""
        return self._prompt[request_id] - self._planned.get(request_id, 0)

    def _overdue(self, request_id: str) -> bool:
        """Whether the request has waited longer than its patience allows."""
        patience = PATIENCE * (self._left(request_id) + self.max_batched_tokens)
        return self.clock - self._arrival[request_id] >= patience

    def _share(self, budget: int, reused: dict[str, tuple[int, int]]) -> dict[str, int]:
        """The number of prompt tokens of each request in this step; requests that start get a slot. What need not be
        read is noted in `reused`, and counts as read."""
        unread = {request_id for table in self.tables.values() for request_id in table.ids[table.decoding :]}
        reading, counts = set(unread), dict[str, int]()
        """Prompts that hold a state of their own until the end of the step, even if they end in it."""
        if not unread and self.num_running == self.max_num_seqs:
            return counts  # waiting requests need a slot
        prompts = [request_id for request_id in self._arrival if request_id in unread or request_id in self._waiting]
        overdue = [request_id for request_id in prompts if self._overdue(request_id)]
        shortest = sorted(prompts, key=self._left)
        blocked, claimed = None, dict[Hashable, str]()
        for order, tokens in ((overdue, -(-budget // 2)), (shortest, budget)):
            for request_id in order:
                room = tokens - sum(counts.values())
                if room == 0:
                    break
                at = self._planned.get(request_id, 0) + counts.get(request_id, 0)
                further = at if request_id in counts else self._prefixes.reach(request_id, at)
                claim = self._prefixes.claim(request_id, further)
                if claimed.get(claim, request_id) != request_id:
                    continue  # another prompt reads the same now, and this one copies it in the next step
                count = self._whole_cells(request_id, further, room, first=not counts)
                if not count:
                    continue
                if request_id not in self._planned:
                    if not self._may_start(request_id, reading, counts.keys() - reading, blocked):
                        blocked = blocked or (request_id if order is overdue else None)
                        continue
                    self._start(request_id)
                if further > at:
                    reused[request_id] = (at, further)
                    self._planned[request_id] = further
                if claim is not None:
                    claimed[claim] = request_id
                counts[request_id] = counts.get(request_id, 0) + count
                if counts[request_id] < self._left(request_id):
                    reading.add(request_id)
        return counts

    def _whole_cells(self, request_id: str, at: int, room: int, first: bool) -> int:
        """How many tokens from `at` on fit into `room`, up to a border. first: at least up to the next one."""
        end = min(at + room, self._prompt[request_id])
        borders = self._borders[request_id]
        if not borders:
            return end - at
        index = bisect_right(borders, end)
        if index and borders[index - 1] > at:
            return borders[index - 1] - at
        return borders[index] - at if first else 0

    def _cells(self, request_id: str, at: int, count: int) -> list[tuple[int, int]]:
        """(start, tokens) of the chunks in which `count` tokens from `at` on are read."""
        borders = self._borders[request_id]
        ends = borders[bisect_right(borders, at) : bisect_right(borders, at + count)] or (at + count,)
        return [(start, end - start) for start, end in zip((at, *ends), ends, strict=False)]

    def _start(self, request_id: str) -> None:
        """Gives a waiting request a slot."""
        del self._waiting[request_id]
        self.tables.setdefault(self._demand[request_id].group, SlotTable(self.max_num_seqs)).take(request_id)
        self._planned[request_id] = 0

    def _placed(
        self,
        decode: tuple[tuple[Group, tuple[str, ...]], ...],
        counts: dict[str, int],
        reused: dict[str, tuple[int, int]],
    ) -> StepPlan:
        """The plan; prompts that end in it are first moved to the slots in which they will decode."""
        last = {r: self._planned[r] + count == self._prompt[r] for r, count in counts.items()}
        exchanges = []
        for group, table in self.tables.items():
            ended = [r for r in counts if last[r] and self._demand[r].group == group]
            exchanges += [Exchange(group, pair) for pair in table.promote(ended)]
        chunks, copies = [], []
        for ends in (True, False):
            for group, table in self.tables.items():
                for slot, r in enumerate(table.ids):
                    if r in counts and last[r] == ends:
                        cells = self._cells(r, self._planned[r], counts[r])
                        for start, count in cells:
                            is_last = ends and (start, count) == cells[-1]
                            chunks.append(Chunk(r, group, slot, start, count, last=is_last))
        for group, table in self.tables.items():
            copies += [Reuse(r, group, slot, *reused[r]) for slot, r in enumerate(table.ids) if r in reused]
        return StepPlan(decode, tuple(chunks), tuple(exchanges), tuple(copies))

    def _may_start(
        self, request_id: str, reading: Collection[str], ending: Collection[str], blocked: str | None
    ) -> bool:
        """Whether a waiting request may start now without taking what the overdue request `blocked` waits for."""
        group = self._demand[request_id].group
        free = self.max_num_seqs - self.num_running
        if free == 0:
            return False
        if blocked is not None:
            takes_bytes = self.max_bytes is not None and self._demand[request_id].most > 0
            if free == 1 or group != self.default_group or takes_bytes:
                return False
        others = sum(running != self.default_group for running in self.tables)
        if group not in self.tables and group != self.default_group and others >= self.max_groups:
            return False
        return self.max_bytes is None or self._bytes(request_id, reading, ending) <= self.max_bytes

    def _bytes(self, request_id: str, reading: Collection[str] = (), ending: Collection[str] = ()) -> int:
        """Bytes in use if the request runs too. All rows of a group are as large as its largest row. Besides the states
        of prompts in `reading`, only one exists at a time: the request's, or one in `ending`, which are read whole in
        this step."""
        rows: dict[Group, int] = {}
        own, largest = 0, dict(self._row_bytes)
        for running in (*self._planned, request_id):
            demand = self._demand[running]
            own += demand.own_bytes
            rows[demand.group] = rows.get(demand.group, 0) + 1
            largest[demand.group] = max(largest.get(demand.group, 0), demand.row_bytes)
        prompts = sum(self._demand[other].prompt_bytes for other in reading)
        prompts += max(self._demand[other].prompt_bytes for other in (*ending, request_id))
        return own + prompts + sum(count * largest[group] for group, count in rows.items())
