"""A plain model of the slots, which checks what a scheduler plans."""

import itertools
from dataclasses import replace

from serve.scheduling import Chunk, Demand, Release, Resume, Reuse, Scheduler, StepPlan

MAX_BYTES = 100
FAMILIES = 2


def family_of(request_id: str) -> int:
    """The family of a request: those of one begin with the same tokens."""
    return int(request_id[1:]) % FAMILIES


class Simulation:
    """A device of strings: which sequence's state lies in which row of its group, and how much of its prompt was
    read. cell: prompts are read in cells of so many tokens, and requests of one of `FAMILIES` begin alike: what one has
    read, the others may copy. None: in chunks of any size, and nothing is copied. keeps: whether the state of the
    next sequence that is set aside is kept, again and again."""

    def __init__(
        self,
        max_num_seqs: int,
        budget: int,
        max_groups: int,
        cell: int | None = None,
        keeps: tuple[bool, ...] = (True,),
    ) -> None:
        self.cell, self.max_groups, self.keeps = cell, max_groups, itertools.cycle(keeps)
        self.known = [0] * FAMILIES
        self.copied = 0
        self.scheduler = Scheduler(
            max_num_seqs,
            budget,
            max_queue=1000,
            max_groups=max_groups,
            max_bytes=MAX_BYTES,
            default_group="x",
            prefixes=self if cell else None,
        )
        self.rows: dict[str, list[str | None]] = {group: [None] * max_num_seqs for group in "xyz"}
        self.demand: dict[str, Demand] = {}
        self.prompt: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.wanted: dict[str, int] = {}
        self.priority: dict[str, int] = {}
        self.movable: dict[str, bool] = {}
        self.aside: set[str] = set()
        self.set_aside = 0
        self.started: list[str] = []
        self.arrived: list[str] = []

    def add(self, prompt: int, new_tokens: int, demand: Demand, priority: int = 0, movable: bool = True) -> None:
        request_id, borders = f"r{len(self.arrived)}", self.borders(prompt) if self.cell else ()
        self.scheduler.add(request_id, prompt, demand, borders, priority=priority, movable=movable)
        self.wanted[request_id], self.priority[request_id], self.movable[request_id] = new_tokens, priority, movable
        self.arrived.append(request_id)
        self.demand[request_id] = demand
        self.prompt[request_id], self.left[request_id], self.read[request_id] = prompt, new_tokens, 0

    def borders(self, prompt: int) -> tuple[int, ...]:
        return (*range(self.cell, prompt, self.cell), prompt)

    def reach(self, request_id: str, at: int) -> int:
        """What the scheduler is told: as far as its family is known, but never the whole prompt."""
        known, prompt = self.known[family_of(request_id)], self.prompt[request_id]
        return max([border for border in self.borders(prompt) if at < border <= min(known, prompt - 1)], default=at)

    def claim(self, request_id: str, at: int) -> object:
        """Whole cells before the last are of use to others."""
        end = at // self.cell * self.cell + self.cell
        return (family_of(request_id), end) if end < self.prompt[request_id] else None

    def grow(self, index: int, own_bytes: int) -> None:
        """A sequence that runs and may be set aside needs more, but never more than there is."""
        running = [r for r in self.running() if self.movable[r]]
        if running:
            request_id = running[index % len(running)]
            demand = self.demand[request_id]
            own_bytes = min(demand.own_bytes + own_bytes, MAX_BYTES - demand.row_bytes - demand.prompt_bytes)
            self.demand[request_id] = replace(demand, own_bytes=own_bytes)
            self.scheduler.grows(request_id, own_bytes)

    def make_room(self) -> None:
        """Sets aside whom the scheduler names: nobody in vain, and nobody for one who is no more urgent."""
        victims, exceeded = self.scheduler.victims(), self.taken() > MAX_BYTES
        idle = [r for r in self.prompt if r not in self.running()]
        first = min(idle, key=lambda r: (self.priority[r], self.arrived.index(r)), default=None)
        for request_id in victims:
            if not exceeded:
                assert self.priority[request_id] > self.priority[first]
            exceeded = exceeded and self.taken([r for r in self.running() if r != request_id]) > MAX_BYTES
            kept = self.read[request_id] == self.prompt[request_id] and next(self.keeps)
            group = self.demand[request_id].group
            self.apply(group, self.scheduler.set_aside(request_id, kept=kept))
            self.set_aside += 1
            if kept:
                self.aside.add(request_id)
            else:
                self.read[request_id], self.left[request_id] = 0, self.wanted[request_id]
        if first is not None and not self.has_room(first, self.running()):
            stay = [r for r in self.running() if self.priority[r] <= self.priority[first] or not self.movable[r]]
            assert not self.has_room(first, stay), "a less urgent one runs, and could make way"

    def step(self, prompt_tokens: int | None = None) -> StepPlan:
        self.make_room()
        before = self.running()
        plan = self.scheduler.schedule(prompt_tokens)
        if prompt_tokens is not None and plan.decode:
            assert sum(chunk.count for chunk in plan.prefill) <= max(self.cell or 1, prompt_tokens)
        self.run(plan)
        assert self.taken() <= MAX_BYTES or len(before) == 1
        return plan

    def running(self) -> list[str]:
        return [r for rows in self.rows.values() for r in rows if r is not None]

    def taken(self, ids: list[str] | None = None) -> int:
        """Bytes of these sequences, or of all that run."""
        ids, total = self.running() if ids is None else ids, 0
        for group in self.rows:
            demands = [self.demand[r] for r in ids if self.demand[r].group == group]
            total += len(demands) * max((d.row_bytes for d in demands), default=0)
            total += sum(d.own_bytes for d in demands)
        return total + sum(self.demand[r].prompt_bytes for r in ids if self.read[r] < self.prompt[r])

    def has_room(self, request_id: str, running: list[str]) -> bool:
        """Whether a request could run beside others."""
        group = self.demand[request_id].group
        groups = {self.demand[r].group for r in running} - {"x"}
        enough = group in groups | {"x"} or len(groups) < self.max_groups
        slots = len(running) < self.scheduler.max_num_seqs
        return slots and enough and self.taken([*running, request_id]) <= MAX_BYTES

    def run(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.scheduler.max_batched_tokens
        for exchange in plan.exchanges:
            rows, (a, b) = self.rows[exchange.group], exchange.slots
            rows[a], rows[b] = rows[b], rows[a]
        decoding = {group: len(ids) for group, ids in plan.decode}
        for group in "xyz":
            slots = [chunk.slot for chunk in plan.prefill if chunk.group == group]
            first = decoding.get(group, 0) + sum(resume.group == group for resume in plan.resumed)
            ended = [chunk.slot for chunk in plan.prefill if chunk.group == group and chunk.last]
            assert slots == sorted(slots)
            assert ended == list(range(first, first + len(ended)))
        for group, ids in plan.decode:
            assert ids, "an empty group"
            for slot, request_id in enumerate(ids):
                assert self.rows[group][slot] == request_id
                assert self.read[request_id] == self.prompt[request_id], "decoded before its prompt was read"
        for resume in plan.resumed:
            self.resume(resume, decoding.get(resume.group, 0))
        reused = {reuse.request_id: reuse for reuse in plan.reused}
        for chunk in plan.prefill:
            if chunk.request_id in reused:
                self.copy(reused.pop(chunk.request_id))
            self.prefill(chunk)
        assert not reused, "copied, and nothing read"
        ends = [chunk.request_id in plan.sampled for chunk in plan.prefill]
        assert ends == sorted(ends, reverse=True), "a prompt that goes on is read before one that ends"
        for chunk in plan.prefill if self.cell else ():
            self.compute(chunk)
        for request_id in plan.sampled:
            self.left[request_id] -= 1
        for request_id in [r for r in plan.sampled if self.left[r] == 0]:
            self.leave(request_id)

    def resume(self, resume: Resume, decoding: int) -> None:
        """Goes on where it was, in the next slot behind those that decode."""
        rows, request_id = self.rows[resume.group], resume.request_id
        self.aside.remove(request_id)
        assert rows[resume.slot] is None
        assert resume.slot == decoding or rows[resume.slot - 1] is not None
        assert self.read[request_id] == self.prompt[request_id]
        rows[resume.slot] = request_id
        assert self.taken() <= MAX_BYTES

    def prefill(self, chunk: Chunk) -> None:
        rows = self.rows[chunk.group]
        assert chunk.count >= 1
        assert chunk.start == self.read[chunk.request_id]
        if chunk.start == 0:
            assert rows[chunk.slot] is None, "slot not empty"
            rows[chunk.slot] = chunk.request_id
            self.started.append(chunk.request_id)
        assert rows[chunk.slot] == chunk.request_id
        self.read[chunk.request_id] += chunk.count
        assert chunk.last == (self.read[chunk.request_id] == self.prompt[chunk.request_id])
        assert self.bytes(chunk) <= MAX_BYTES
        assert sum(any(self.rows[group]) for group in "yz") <= self.max_groups

    def copy(self, reuse: Reuse) -> None:
        rows = self.rows[reuse.group]
        assert rows[reuse.slot] == (reuse.request_id if reuse.start else None)
        assert self.read[reuse.request_id] == reuse.start < reuse.end <= self.known[family_of(reuse.request_id)]
        if not reuse.start:
            self.started.append(reuse.request_id)
        rows[reuse.slot], self.read[reuse.request_id] = reuse.request_id, reuse.end
        self.copied += reuse.end - reuse.start

    def compute(self, chunk: Chunk) -> None:
        """A cell becomes known; nobody has computed it before, unless it is the last of its prompt."""
        end, family = chunk.start + chunk.count, family_of(chunk.request_id)
        assert end in self.borders(self.prompt[chunk.request_id])
        assert chunk.count <= self.cell
        if end < self.prompt[chunk.request_id]:
            assert self.known[family] == chunk.start, "computed what was known, or what another computes"
            self.known[family] = end

    def bytes(self, reading: Chunk) -> int:
        """Rows as large as the largest of their group, and the prompts that are being read."""
        others = [r for r in self.prompt if 0 < self.read[r] < self.prompt[r] and r != reading.request_id]
        total = sum(self.demand[other].prompt_bytes for other in (*others, reading.request_id))
        for rows in self.rows.values():
            sizes = [self.demand[row].row_bytes for row in rows if row is not None]
            total += len(sizes) * max(sizes, default=0)
            total += sum(self.demand[row].own_bytes for row in rows if row is not None)
        return total

    def leave(self, request_id: str) -> None:
        self.apply(self.demand[request_id].group, self.scheduler.finish(request_id))
        self.aside.discard(request_id)
        del self.prompt[request_id]

    def apply(self, group: str, release: Release | None) -> None:
        if release is None:
            return
        rows = self.rows[group]
        for source, target in release.moves:
            rows[target] = rows[source]
        rows[release.freed] = None
        occupied = [row for row in rows if row is not None]
        assert rows[: len(occupied)] == occupied, "running sequences are not compact"
        assert len(set(occupied)) == len(occupied), "one sequence in two slots"
        table = self.scheduler.tables.get(group)
        assert occupied == ([] if table is None else table.ids)

    def abort(self, number: int) -> None:
        """The request with this number leaves, if there are as many."""
        unfinished = list(self.prompt)
        if number < len(unfinished):
            self.leave(unfinished[number])

    def end(self) -> None:
        """Every step does something until all have ended."""
        steps = 0
        while self.scheduler.has_work():
            work = sum(self.prompt[r] - self.read[r] + self.left[r] for r in self.prompt)
            before = self.set_aside
            plan = self.step()
            after = sum(self.prompt[r] - self.read[r] + self.left[r] for r in self.prompt)
            assert after < work or plan.resumed or self.set_aside > before, "a step without progress"
            steps += 1
            assert steps < 5000
        assert not self.prompt
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert not self.scheduler.tables
