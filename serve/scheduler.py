"""Continuous batching, planned with integers: which sequences run in the next step, and how many tokens each.

Every sequence that decodes gets its token in every step, so prompts never starve it; what is left of the token budget
goes to prompts, in chunks. While anything decodes, the caller may bound what prompts get in a step, so that the next
token of a stream comes soon.

The prompt of which least is left comes first, so a short one passes a long one, in the middle of it if need be. On a
clock of tokens that went through the model, a prompt is overdue once it has waited `PATIENCE` times as long as itself
and a full step would take; from then on half of what a step reads goes to overdue prompts, in order of arrival. So no
prompt waits for ever, and a short one is never held up by more than a few steps.

Sequences decode together that keep their past in the same way: each such group has slots of its own. A request whose
group or memory is not there yet lets others pass until it is overdue, too; then nobody starts who could keep it
waiting. The default group never waits for other groups.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass

from serve.slots import Release, SlotTable

Group = Hashable
"""What sequences that decode together have in common."""
PATIENCE = 4
"""How many times its own length, and a full step's, a prompt may wait before it is overdue."""


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
class Exchange:
    """Two slots of a group whose sequences change places; `tokens`: as many as either has in its state, at most."""

    group: Group
    slots: tuple[int, int]
    tokens: int


@dataclass(frozen=True)
class StepPlan:
    """One step: exchanges of slots first, then sequences that decode, by group (the one at index i is in slot i of it),
    then chunks of prompts, those that end before the others."""

    decode: tuple[tuple[Group, tuple[str, ...]], ...]
    prefill: tuple[Chunk, ...]
    exchanges: tuple[Exchange, ...] = ()

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
    `max_bytes`: groups beside `default_group` that may run at the same time, and bytes that the demands may sum up to
    (None: no limit).

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
        self.tables: dict[Group, SlotTable] = {}
        self.clock = 0
        self._waiting: dict[str, None] = {}
        self._arrival: dict[str, int] = {}
        """The clock when each unfinished request came, in order of arrival."""
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
        self._demand[request_id] = demand
        self._arrival[request_id] = self.clock
        self._waiting[request_id] = None

    def schedule(self, prompt_tokens: int | None = None) -> StepPlan:
        """The next step. The caller must run it: its tokens count as done from now on.

        `prompt_tokens`: how many prompt tokens it may have if anything decodes (at least one is read); None: as many as
        the budget holds.
        """
        decode = tuple((group, tuple(t.ids[: t.decoding])) for group, t in self.tables.items() if t.decoding)
        decoding = sum(len(ids) for _, ids in decode)
        budget = self.max_batched_tokens - decoding
        if decoding and prompt_tokens is not None:
            budget = min(budget, max(1, prompt_tokens))
        counts = self._share(budget)
        plan = self._placed(decode, counts)
        for request_id, count in counts.items():
            self._planned[request_id] += count
        self.clock += plan.num_tokens
        return plan

    def measured(self, group: Group, row_bytes: int) -> None:
        """What a row of a running group really takes, where that is more than was asked for."""
        self._row_bytes[group] = row_bytes

    def finish(self, request_id: str) -> Release | None:
        """Removes a request, finished or aborted. Returns what its slot needs, None when it had none.

        Raises KeyError for an unknown id.
        """
        del self._prompt[request_id], self._arrival[request_id]
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
        """Tokens of the prompt that have not been read."""
        return self._prompt[request_id] - self._planned.get(request_id, 0)

    def _overdue(self, request_id: str) -> bool:
        """Whether the request has waited for too much other work."""
        patience = PATIENCE * (self._left(request_id) + self.max_batched_tokens)
        return self.clock - self._arrival[request_id] >= patience

    def _share(self, budget: int) -> dict[str, int]:
        """Prompt tokens of this step, by request; those that start get their slots."""
        unread = {request_id for table in self.tables.values() for request_id in table.ids[table.decoding :]}
        reading, counts = set(unread), dict[str, int]()
        """Prompts whose states are there besides rows: until the end of the step, even where they end in it."""
        if not unread and self.num_running == self.max_num_seqs:
            return counts  # whoever waits needs a slot
        prompts = [request_id for request_id in self._arrival if request_id in unread or request_id in self._waiting]
        overdue = [request_id for request_id in prompts if self._overdue(request_id)]
        shortest = sorted(prompts, key=self._left)
        hindered = None
        for order, tokens in ((overdue, -(-budget // 2)), (shortest, budget)):
            for request_id in order:
                room = tokens - sum(counts.values())
                if room == 0:
                    break
                if request_id not in self._planned:
                    if not self._may_start(request_id, reading, counts.keys() - reading, hindered):
                        hindered = hindered or (request_id if order is overdue else None)
                        continue
                    self._start(request_id)
                done = counts.get(request_id, 0)
                counts[request_id] = done + min(room, self._left(request_id) - done)
                if counts[request_id] < self._left(request_id):
                    reading.add(request_id)
        return counts

    def _start(self, request_id: str) -> None:
        """Gives a slot."""
        del self._waiting[request_id]
        self.tables.setdefault(self._demand[request_id].group, SlotTable(self.max_num_seqs)).take(request_id)
        self._planned[request_id] = 0

    def _placed(self, decode: tuple[tuple[Group, tuple[str, ...]], ...], counts: dict[str, int]) -> StepPlan:
        """The plan, with prompts that end in it moved to where they will decode."""
        last = {r: self._planned[r] + count == self._prompt[r] for r, count in counts.items()}
        exchanges = []
        for group, table in self.tables.items():
            ended = [r for r in counts if last[r] and self._demand[r].group == group]
            tokens = max((self._planned[r] for r in table.ids[table.decoding :]), default=0)
            exchanges += [Exchange(group, pair, tokens) for pair in table.promote(ended)]
        chunks = []
        for ends in (True, False):
            for group, table in self.tables.items():
                for slot, r in enumerate(table.ids):
                    if r in counts and last[r] == ends:
                        chunks.append(Chunk(r, group, slot, self._planned[r], counts[r], last=ends))
        return StepPlan(decode, tuple(chunks), tuple(exchanges))

    def _may_start(
        self, request_id: str, reading: Collection[str], ending: Collection[str], hindered: str | None
    ) -> bool:
        """Whether a request that waits may run beside those that do, and keeps `hindered`, which is overdue, from
        nothing that it waits for."""
        group = self._demand[request_id].group
        free = self.max_num_seqs - self.num_running
        if free == 0:
            return False
        if hindered is not None:
            takes_bytes = self.max_bytes is not None and self._demand[request_id].most > 0
            if free == 1 or group != self.default_group or takes_bytes:
                return False
        others = sum(running != self.default_group for running in self.tables)
        if group not in self.tables and group != self.default_group and others >= self.max_groups:
            return False
        return self.max_bytes is None or self._bytes(request_id, reading, ending) <= self.max_bytes

    def _bytes(self, request_id: str, reading: Collection[str] = (), ending: Collection[str] = ()) -> int:
        """Bytes once the request runs too: all rows of a group are as large as its largest, and beside the prompts that
        are `reading` there is its own, or one of those that are read from beginning to end in this step."""
        rows: dict[Group, int] = {}
        largest = dict(self._row_bytes)
        for running in (*self._planned, request_id):
            demand = self._demand[running]
            rows[demand.group] = rows.get(demand.group, 0) + 1
            largest[demand.group] = max(largest.get(demand.group, 0), demand.row_bytes)
        prompts = sum(self._demand[other].prompt_bytes for other in reading)
        prompts += max(self._demand[other].prompt_bytes for other in (*ending, request_id))
        return prompts + sum(count * largest[group] for group, count in rows.items())
