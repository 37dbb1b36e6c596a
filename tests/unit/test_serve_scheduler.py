"""The scheduler's promises, checked over random traffic against a plain model of the slots."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scheduling import (
    PATIENCE,
    Chunk,
    Demand,
    QueueFullError,
    Release,
    Resume,
    Reuse,
    Scheduler,
    StepPlan,
)

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
        idle = [r for r in self.prompt if not any(r in rows for rows in self.rows.values())]
        most = min((self.priority[r] for r in idle), default=None)
        for request_id in victims:
            if not exceeded:
                assert self.priority[request_id] > most
            exceeded = exceeded and self.taken(without=request_id) > MAX_BYTES
            kept = self.read[request_id] == self.prompt[request_id] and next(self.keeps)
            group = self.demand[request_id].group
            self.apply(group, self.scheduler.set_aside(request_id, kept=kept))
            self.set_aside += 1
            if kept:
                self.aside.add(request_id)
            else:
                self.read[request_id], self.left[request_id] = 0, self.wanted[request_id]

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

    def taken(self, without: str | None = None) -> int:
        """Bytes of all that run."""
        total = 0
        for rows in self.rows.values():
            demands = [self.demand[r] for r in rows if r is not None and r != without]
            total += len(demands) * max((d.row_bytes for d in demands), default=0)
            total += sum(d.own_bytes for d in demands)
        reading = [r for r in self.running() if r != without and self.read[r] < self.prompt[r]]
        return total + sum(self.demand[r].prompt_bytes for r in reading)

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


DEMANDS = st.builds(
    Demand,
    group=st.sampled_from("xyz"),
    row_bytes=st.integers(0, 40),
    prompt_bytes=st.integers(0, 30),
    own_bytes=st.integers(0, 30),
)
ARRIVALS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 7), DEMANDS), max_size=4)
URGENT_ARRIVALS = st.lists(
    st.tuples(st.integers(1, 13), st.integers(1, 7), DEMANDS, st.integers(-1, 2), st.booleans()), max_size=4
)
LIMITS = st.none() | st.integers(0, 5)
GROWTH = st.tuples(st.integers(0, 9), st.integers(0, 40))


@settings(max_examples=150, deadline=None)
@given(
    max_num_seqs=st.integers(1, 5),
    extra_budget=st.integers(1, 11),
    max_groups=st.integers(1, 3),
    traffic=st.lists(st.tuples(ARRIVALS, st.integers(0, 30), LIMITS), min_size=1, max_size=25),
    cell=st.none() | st.integers(1, 5),
)
def test_invariants_over_random_traffic(max_num_seqs, extra_budget, max_groups, traffic, cell):
    simulation = Simulation(max_num_seqs, max_num_seqs + extra_budget, max_groups, cell and min(cell, extra_budget))
    for arrivals, abort, limit in traffic:
        for arrival in arrivals:
            simulation.add(*arrival)
        abort_one(simulation, abort)
        simulation.step(limit)
    assert not simulation.set_aside, "nobody is more urgent, and nobody grows"
    end(simulation)


def abort_one(simulation: Simulation, number: int) -> None:
    unfinished = list(simulation.prompt)
    if number < len(unfinished):
        simulation.leave(unfinished[number])


def end(simulation: Simulation) -> None:
    """Every step does something until all have ended."""
    steps = 0
    while simulation.scheduler.has_work():
        work = sum(simulation.prompt[r] - simulation.read[r] + simulation.left[r] for r in simulation.prompt)
        before = simulation.set_aside
        plan = simulation.step()
        after = sum(simulation.prompt[r] - simulation.read[r] + simulation.left[r] for r in simulation.prompt)
        assert after < work or plan.resumed or simulation.set_aside > before, "a step without progress"
        steps += 1
        assert steps < 5000
    assert not simulation.prompt
    assert simulation.scheduler.num_running == simulation.scheduler.num_waiting == 0
    assert not simulation.scheduler.tables


@settings(max_examples=300, deadline=None)
@given(
    max_num_seqs=st.integers(1, 5),
    extra_budget=st.integers(1, 11),
    max_groups=st.integers(1, 3),
    traffic=st.lists(
        st.tuples(URGENT_ARRIVALS, st.integers(0, 30), LIMITS, st.lists(GROWTH, max_size=2)), min_size=1, max_size=25
    ),
    cell=st.none() | st.integers(1, 5),
    keeps=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_urgent_requests_and_growing_ones(max_num_seqs, extra_budget, max_groups, traffic, cell, keeps):
    """What was set aside goes on or begins anew, and all end. No sequence that may be set aside runs while a more
    urgent one waits for what it has."""
    cell = cell and min(cell, extra_budget)
    simulation = Simulation(max_num_seqs, max_num_seqs + extra_budget, max_groups, cell, tuple(keeps))
    for arrivals, abort, limit, growth in traffic:
        for arrival in arrivals:
            simulation.add(*arrival)
        abort_one(simulation, abort)
        for grown in growth:
            simulation.grow(*grown)
        simulation.step(limit)
    end(simulation)


@settings(max_examples=30, deadline=None)
@given(
    extra_budget=st.integers(1, 20),
    length=st.integers(1, 200),
    flood=st.lists(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 5)), max_size=4), min_size=1, max_size=9),
    max_num_seqs=st.integers(2, 6),
)
def test_no_prompt_starves_under_an_endless_flood(extra_budget, length, flood, max_num_seqs):
    """Others may pass it while it is not overdue; then it gets half of what is read until it is done."""
    simulation = Simulation(max_num_seqs, max_num_seqs + extra_budget, max_groups=1)
    budget = simulation.scheduler.max_batched_tokens
    simulation.add(length, 1, Demand("x"))
    for step in range(1000):
        for prompt, new_tokens in flood[step % len(flood)]:
            if simulation.scheduler.num_waiting < 12:
                simulation.add(prompt, new_tokens, Demand("x"))
        before, left = simulation.scheduler.clock, length - simulation.read["r0"]
        plan = simulation.step()
        if "r0" not in simulation.prompt:
            break
        chunks = {chunk.request_id: chunk.count for chunk in plan.prefill}
        if before >= PATIENCE * (left + budget) and "r0" in simulation.started:
            assert chunks["r0"] >= sum(chunks.values()) / 2
    assert "r0" not in simulation.prompt
    # Its own half of each step, after a wait that is bounded, and a slot that has to become free first.
    assert simulation.scheduler.clock <= (PATIENCE + 2) * (length + 60 + budget) + max_num_seqs * budget


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([{"group": "w"}, {"group": "y", "row_bytes": 60, "prompt_bytes": 40}]),
    flood=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from("xyz"), st.integers(0, 50)), min_size=4
    ),
    max_num_seqs=st.integers(1, 4),
)
def test_what_does_not_fit_yet_starts_within_a_bound(size, flood, max_num_seqs):
    """An endless flood of requests that fit, each step as many as the queue takes: the one that needs a group, or all
    the memory, runs all the same."""
    simulation = Simulation(max_num_seqs, max_num_seqs + 3, max_groups=2)
    simulation.rows["w"] = [None] * max_num_seqs
    for group in "yz":
        simulation.add(2, 9, Demand(group, row_bytes=1))
    simulation.step()
    simulation.add(5, 1, Demand(**size))
    victim = simulation.arrived[-1]
    for step in range(400):
        for prompt, new_tokens, group, size_of in flood[step % len(flood) :][:2]:
            if simulation.scheduler.num_waiting < 12:
                simulation.add(prompt, new_tokens, Demand(group, row_bytes=size_of))
        simulation.step()
        if victim in simulation.started:
            break
    assert victim in simulation.started
    assert simulation.scheduler.clock <= 40 * PATIENCE * (5 + simulation.scheduler.max_batched_tokens)


def test_a_demand_that_never_fits_is_refused():
    scheduler = Scheduler(max_num_seqs=2, max_batched_tokens=5, max_queue=10, max_bytes=10)
    with pytest.raises(ValueError, match="needs 11 bytes, more than the 10"):
        scheduler.add("a", 2, Demand(row_bytes=7, prompt_bytes=4))
    assert not scheduler.has_work()


def test_what_waits_for_room_is_passed_until_it_is_overdue():
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=50, max_queue=200, max_groups=3, max_bytes=10)
    scheduler.add("runs", 2, Demand("a", row_bytes=6))
    scheduler.schedule()
    scheduler.add("large", 2, Demand("b", row_bytes=9))
    passed = 0
    for number in range(200):
        scheduler.add(f"small {number}", 2, Demand("c", row_bytes=1))
        started = [chunk.request_id for chunk in scheduler.schedule().prefill]
        if not started:
            break
        passed += 1
        scheduler.finish(started[0])
    assert 10 < passed < PATIENCE * (2 + 50)
    scheduler.finish("runs")
    plan = scheduler.schedule()
    assert sorted(chunk.request_id for chunk in plan.prefill) == ["large", f"small {passed}"]


def test_the_default_group_waits_for_no_other():
    scheduler = Scheduler(max_num_seqs=8, max_batched_tokens=50, max_queue=10, max_groups=2, default_group="plain")
    for group in "abc":
        scheduler.add(group, 2, Demand(group))
    scheduler.add("p", 2, Demand("plain"))
    assert scheduler.schedule().sampled == ["a", "b", "p"]
    for _ in range(300):
        assert scheduler.schedule().sampled == ["a", "b", "p"]
    # "c" is overdue by now: who could keep its group away waits behind it, who could not does not.
    scheduler.add("a2", 2, Demand("a"))
    scheduler.add("p2", 2, Demand("plain"))
    assert scheduler.schedule().sampled == ["a", "b", "p", "p2"]
    scheduler.finish("a")
    assert scheduler.schedule().sampled == ["b", "p", "p2", "c"]


def test_a_slot_is_kept_for_what_is_overdue():
    scheduler = Scheduler(max_num_seqs=3, max_batched_tokens=20, max_queue=10, default_group="plain")
    scheduler.add("a", 2, Demand("a"))
    scheduler.add("b", 2, Demand("b"))
    for _ in range(100):
        assert scheduler.schedule().sampled == ["a"]
    for name in ("p", "p2"):
        scheduler.add(name, 2, Demand("plain"))
    assert scheduler.schedule().sampled == ["a", "p"]
    scheduler.finish("a")
    assert sorted(scheduler.schedule().sampled) == ["b", "p", "p2"]


def test_every_decoding_sequence_runs_in_every_step():
    scheduler = Scheduler(max_num_seqs=3, max_batched_tokens=5, max_queue=10)
    scheduler.add("a", 2)
    assert scheduler.schedule().sampled == ["a"]
    scheduler.add("long", 100)
    for _ in range(10):
        plan = scheduler.schedule()
        assert plan.decoding == ["a"]
        assert [(chunk.request_id, chunk.count) for chunk in plan.prefill] == [("long", 4)]
    scheduler.add("b", 1)
    plan = scheduler.schedule()
    assert plan.sampled == ["a", "b"]
    assert [(chunk.request_id, chunk.slot, chunk.count) for chunk in plan.prefill] == [("b", 1, 1), ("long", 2, 3)]
    assert [exchange.slots for exchange in plan.exchanges] == [(1, 2)]


def test_a_short_prompt_passes_a_long_one_and_a_long_one_is_not_passed_for_ever():
    scheduler = Scheduler(max_num_seqs=3, max_batched_tokens=10, max_queue=10)
    scheduler.add("long", 100)
    scheduler.schedule()
    scheduler.add("short", 3)
    plan = scheduler.schedule()
    assert [(c.request_id, c.count, c.last) for c in plan.prefill] == [("short", 3, True), ("long", 7, False)]
    scheduler.finish("short")
    for number in range(1000):
        scheduler.add(f"s{number}", 10)
        first = scheduler.schedule().prefill[0].request_id
        if first == "long":
            break
        scheduler.finish(first)
    assert 10 < number < PATIENCE * (100 + 10) / 10


def test_prompts_are_bounded_while_anything_decodes():
    scheduler = Scheduler(max_num_seqs=3, max_batched_tokens=100, max_queue=10)
    scheduler.add("long", 250)
    assert scheduler.schedule(prompt_tokens=7).num_tokens == 100
    scheduler.add("a", 2)
    assert [(c.request_id, c.count) for c in scheduler.schedule(7).prefill] == [("a", 2), ("long", 98)]
    assert [(c.request_id, c.count) for c in scheduler.schedule(7).prefill] == [("long", 7)]
    assert [(c.request_id, c.count) for c in scheduler.schedule(0).prefill] == [("long", 1)]
    assert scheduler.schedule().num_tokens == 45


def test_a_chunk_ends_where_the_budget_does():
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=8, max_queue=10)
    for name, prompt in [("a", 3), ("b", 7), ("c", 8)]:
        scheduler.add(name, prompt)
    first = scheduler.schedule()
    assert [(c.request_id, c.start, c.count, c.last) for c in first.prefill] == [("a", 0, 3, True), ("b", 0, 5, False)]
    second = scheduler.schedule()
    assert second.decoding == ["a"]
    assert [(c.request_id, c.start, c.count, c.last) for c in second.prefill] == [("b", 5, 2, True), ("c", 0, 5, False)]


def test_queue_is_bounded_and_frees():
    scheduler = Scheduler(max_num_seqs=1, max_batched_tokens=8, max_queue=2)
    for name in "abc":
        scheduler.add(name, 1)
    with pytest.raises(QueueFullError):
        scheduler.add("d", 1)
    scheduler.finish("b")
    scheduler.add("d", 1)
    assert scheduler.num_waiting == 3
