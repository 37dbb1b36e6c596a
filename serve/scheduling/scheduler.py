"""Continuous batching, planned with integers: which sequences run in the next step, and with how many tokens each.

Every decoding sequence gets a token in every step. The rest of the token budget goes to prompts, in chunks. While any
sequence decodes, the caller may limit the prompt tokens of a step, so that streams do not wait long for their tokens.

The most urgent prompts come first, and among them the prompt with the fewest unread tokens, so that a short prompt
overtakes a long one, even one that has begun. Time is counted in tokens that went through the model. A prompt is
overdue when it has waited `PATIENCE` times the sum of its unread tokens and a full step. Of the most urgent prompts
those that are overdue get half of a step's prompt tokens, in order of arrival. So every prompt is read eventually, and
a short one waits only a few steps; but a less urgent one waits for as long as more urgent ones come.

Sequences with the same cache form a group, decode together, and have slots of their own. While a request waits for a
group or for memory, others may start before it; once it is overdue, or if it is more urgent, no request may start that
would delay it further. The default group never waits for other groups.

A sequence may be set aside, and another takes its slot and its memory: where sequences have grown beyond the memory
there is, and where a more urgent request cannot start otherwise (`victims`). It goes on as soon as it fits again, from
its state if that was kept, else from the beginning of its prompt.
"""

from bisect import bisect_right
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace

from serve.scheduling.capacity import Capacity
from serve.scheduling.plan import (
    Chunk,
    Demand,
    Entry,
    Exchange,
    Group,
    NoPrefixes,
    Prefixes,
    Resume,
    Reuse,
    StepPlan,
)
from serve.scheduling.slots import Release, SlotTable

PATIENCE = 4
"""A prompt is overdue after waiting so many times the sum of its unread tokens and a full step, in tokens."""


class QueueFullError(Exception):
    """The queue is full; the client should try again later."""


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
        self.default_group = default_group
        self.capacity = Capacity(max_num_seqs, max_groups, max_bytes, default_group)
        self.tables: dict[Group, SlotTable] = {}
        self.clock = 0
        self._prefixes = prefixes or NoPrefixes()
        self._entries: dict[str, Entry] = {}
        """In order of arrival."""
        self._arrived = 0

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._entries) - self.num_running

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return sum(map(len, self.tables.values()))

    def decodes(self, request_id: str) -> bool:
        """Whether a request has a slot, and its prompt is read."""
        entry = self._entries[request_id]
        return entry.place == "running" and not entry.left

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._entries)

    def add(
        self,
        request_id: str,
        prompt_tokens: int,
        demand: Demand | None = None,
        borders: Sequence[int] = (),
        *,
        priority: int = 0,
        movable: bool = True,
    ) -> None:
        """Queues a request. borders: where chunks of its prompt must end, ascending, the prompt's own end included;
        without, they end anywhere. priority: the lower, the more urgent. movable: whether it may be set aside. Raises
        QueueFullError if the queue is full, ValueError for an id in use, an empty prompt or a demand larger than
        max_bytes."""
        demand = demand or Demand(self.default_group)
        if request_id in self._entries:
            raise ValueError(f"request id {request_id!r} is in use; give every request its own")
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        most = self.capacity.nbytes
        if most is not None and demand.most > most:
            raise ValueError(f"the request needs {demand.most} bytes, more than the {most} there are")
        if len(self._entries) >= self.max_num_seqs + self.max_queue:
            raise QueueFullError(f"{self.num_running} requests are running and {self.num_waiting} waiting")
        self._entries[request_id] = Entry(
            request_id, prompt_tokens, borders, demand, self.clock, self._arrived, priority, movable
        )
        self._arrived += 1

    def victims(self) -> list[str]:
        """Whom the caller must `set_aside` before the next step: the least urgent that came last, until all others have
        room, and the most urgent request that waits has, if it is more urgent than they are. Nobody where that would
        not help."""
        running = self._running()
        movable = sorted((entry for entry in running if entry.movable), key=lambda entry: entry.rank, reverse=True)
        found: list[Entry] = []
        while movable and len(running) > 1 and self.capacity.exceeded(running):
            found.append(movable.pop(0))
            running.remove(found[-1])
        waiting = [entry for entry in self._entries.values() if entry.place != "running"]
        first = min(waiting, key=lambda entry: entry.rank, default=None)
        if first is not None:
            less = [entry for entry in movable if entry.priority > first.priority]
            found += self._making_way(first, running, less)
        return [entry.request_id for entry in found]

    def _making_way(self, first: Entry, running: list[Entry], candidates: list[Entry]) -> list[Entry]:
        """Of the candidates as few as possible, from the first on, without whom the request fits."""
        for count in range(len(candidates) + 1):
            out = candidates[:count]
            if not self.capacity.fits(first, [entry for entry in running if entry not in out]):
                continue
            for entry in tuple(out):
                fewer = [other for other in out if other is not entry]
                if self.capacity.fits(first, [other for other in running if other not in fewer]):
                    out = fewer
            return out
        return []

    def set_aside(self, request_id: str, *, kept: bool) -> Release:
        """Takes a running sequence out of its slot. kept: its state is kept, and it has decoded; else its prompt is
        read anew. Returns how its slot is released. Raises KeyError for an unknown id, ValueError for one that does not
        run, or whose prompt is not read whole where the state is kept."""
        entry = self._entries[request_id]
        if entry.place != "running" or (kept and entry.left):
            raise ValueError(f"request {request_id!r} is {entry.place}, with {entry.left} tokens of its prompt left")
        entry.place = "aside" if kept else "waiting"
        entry.read = entry.read if kept else 0
        return self._release(entry)

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
        plan = self._placed(decode, counts, reused, self._resumed())
        for request_id, count in counts.items():
            self._entries[request_id].read += count
        self.clock += plan.num_tokens
        return plan

    def measured(self, group: Group, row_bytes: int) -> None:
        """Records the measured bytes of a row in a running group, which may be more than the demand."""
        self.capacity.row_bytes[group] = row_bytes

    def grows(self, request_id: str, own_bytes: int) -> None:
        """A sequence will take so many `own_bytes` from now on. If that is more than there is, `victims` says who makes
        way. The caller sees to it that each fits alone."""
        entry = self._entries[request_id]
        entry.demand = replace(entry.demand, own_bytes=own_bytes)

    def finish(self, request_id: str) -> Release | None:
        """Removes a finished or aborted request. Returns how its slot is released, None if it had none.

        Raises KeyError for an unknown id.
        """
        entry = self._entries.pop(request_id)
        return self._release(entry) if entry.place == "running" else None

    def _release(self, entry: Entry) -> Release:
        table = self.tables[entry.group]
        release = table.release(entry.request_id)
        if not table:
            del self.tables[entry.group]
            self.capacity.row_bytes.pop(entry.group, None)
        return release

    def _running(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.place == "running"]

    def _overdue(self, entry: Entry) -> bool:
        """Whether the request has waited longer than its patience allows."""
        return self.clock - entry.arrival >= PATIENCE * (entry.left + self.max_batched_tokens)

    def _share(self, budget: int, reused: dict[str, tuple[int, int]]) -> dict[str, int]:
        """The number of prompt tokens of each request in this step; requests that start get a slot. What need not be
        read is noted in `reused`, and counts as read."""
        counts: dict[str, int] = {}
        running = self._running()
        begun = {entry.request_id for entry in running}
        # All but those that have a slot and decode, and those that need nothing but a slot.
        prompts = [entry for entry in self._entries.values() if entry.left]
        if len(begun) == self.max_num_seqs and not any(entry.left for entry in running):
            return counts  # waiting requests need a slot
        urgent = min((entry.priority for entry in prompts), default=0)
        overdue = [entry for entry in prompts if entry.priority == urgent and self._overdue(entry)]
        shortest = sorted(prompts, key=lambda entry: (entry.priority, entry.left))
        blocked, claimed = False, dict[Hashable, str]()
        for order, tokens in ((overdue, -(-budget // 2)), (shortest, budget)):
            for entry in order:
                request_id = entry.request_id
                room = tokens - sum(counts.values())
                if room == 0:
                    break
                at = entry.read + counts.get(request_id, 0)
                further = at if request_id in counts else self._prefixes.reach(request_id, at)
                claim = self._prefixes.claim(request_id, further)
                if claimed.get(claim, request_id) != request_id:
                    continue  # another prompt reads the same now, and this one copies it in the next step
                count = self._whole_cells(entry, further, room, first=not counts)
                if not count:
                    continue
                if entry.place != "running":
                    ending = [e for e in running if e.request_id not in begun and counts.get(e.request_id) == e.left]
                    if not self._may_start(entry, running, ending, blocked):
                        blocked = blocked or order is overdue
                        continue
                    self._start(entry)
                    running.append(entry)
                if further > at:
                    reused[request_id] = (at, further)
                    entry.read = further
                if claim is not None:
                    claimed[claim] = request_id
                counts[request_id] = counts.get(request_id, 0) + count
        return counts

    def _may_start(
        self, entry: Entry, running: list[Entry], ending: Collection[Entry] = (), late: bool = False
    ) -> bool:
        """Whether there is room, and nobody waits for it who comes first. late: a request that is overdue waits."""
        if not self.capacity.fits(entry, running, ending):
            return False
        return not self.capacity.delays(entry, running) or not (late or self._awaited(entry))

    def _awaited(self, entry: Entry) -> bool:
        """Whether a more urgent request waits for room, or one as urgent that was set aside."""
        return any(
            other.priority < entry.priority or (other.place == "aside" and other.rank < entry.rank)
            for other in self._entries.values()
            if other.place != "running"
        )

    def _resumed(self) -> list[Entry]:
        """The sequences that go on, which get a slot."""
        found = []
        for entry in sorted((e for e in self._entries.values() if e.place == "aside"), key=lambda e: e.rank):
            if self._may_start(entry, self._running()):
                self._start(entry)
                found.append(entry)
        return found

    def _whole_cells(self, entry: Entry, at: int, room: int, first: bool) -> int:
        """How many tokens from `at` on fit into `room`, up to a border. first: at least up to the next one."""
        end = min(at + room, entry.prompt)
        borders = entry.borders
        if not borders:
            return end - at
        index = bisect_right(borders, end)
        if index and borders[index - 1] > at:
            return borders[index - 1] - at
        return borders[index] - at if first else 0

    def _start(self, entry: Entry) -> None:
        """Gives a request a slot."""
        entry.place = "running"
        self.tables.setdefault(entry.group, SlotTable(self.max_num_seqs)).take(entry.request_id)

    def _placed(
        self,
        decode: tuple[tuple[Group, tuple[str, ...]], ...],
        counts: dict[str, int],
        reused: dict[str, tuple[int, int]],
        resumed: Collection[Entry],
    ) -> StepPlan:
        """The plan; sequences that go on and prompts that end in it are first moved to the slots in which they will
        decode."""
        last = {r: count == self._entries[r].left for r, count in counts.items()}
        exchanges = []
        for group, table in self.tables.items():
            ready = [entry.request_id for entry in resumed if entry.group == group]
            ready += [r for r in counts if last[r] and self._entries[r].group == group]
            exchanges += [Exchange(group, pair) for pair in table.promote(ready)]
        chunks, copies = [], []
        for ends in (True, False):
            for group, table in self.tables.items():
                for slot, r in enumerate(table.ids):
                    if r in counts and last[r] == ends:
                        cells = _cells(self._entries[r], counts[r])
                        for start, count in cells:
                            is_last = ends and (start, count) == cells[-1]
                            chunks.append(Chunk(r, group, slot, start, count, last=is_last))
        for group, table in self.tables.items():
            copies += [Reuse(r, group, slot, *reused[r]) for slot, r in enumerate(table.ids) if r in reused]
        on = [Resume(e.request_id, e.group, self.tables[e.group].slot_of(e.request_id)) for e in resumed]
        return StepPlan(decode, tuple(chunks), tuple(exchanges), tuple(copies), tuple(on))


def _cells(entry: Entry, count: int) -> list[tuple[int, int]]:
    """(start, tokens) of the chunks in which the next `count` tokens are read."""
    at, borders = entry.read, entry.borders
    ends = borders[bisect_right(borders, at) : bisect_right(borders, at + count)] or (at + count,)
    return [(start, end - start) for start, end in zip((at, *ends), ends, strict=False)]
