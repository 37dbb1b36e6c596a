"""The scheduler's promises, checked over random traffic against a plain model of the slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache_manager import Release, SlotTable
from serve.scheduler import Chunk, Demand, Plan, QueueFullError, Scheduler

MAX_BYTES = 100


class Simulation:
    """A device of strings: which sequence's state lies in which row of its group, and how much of its prompt was
    read."""

    def __init__(self, max_num_seqs: int, budget: int, max_groups: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, budget, max_queue=1000, max_groups=max_groups, max_bytes=MAX_BYTES)
        self.rows: dict[str, list[str | None]] = {group: [None] * max_num_seqs for group in "xyz"}
        self.demand: dict[str, Demand] = {}
        self.prompt: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.started: list[str] = []
        self.arrived: list[str] = []

    def add(self, prompt: int, new_tokens: int, demand: Demand) -> None:
        request_id = f"r{len(self.arrived)}"
        self.scheduler.add(request_id, prompt, demand)
        self.arrived.append(request_id)
        self.demand[request_id] = demand
        self.prompt[request_id], self.left[request_id], self.read[request_id] = prompt, new_tokens, 0

    def run(self, plan: Plan) -> None:
        assert plan.num_tokens <= self.scheduler.max_batched_tokens
        decoding = {group: len(ids) for group, ids in plan.decode}
        for group in "xyz":
            slots = [chunk.slot for chunk in plan.prefill if chunk.group == group]
            first = decoding.get(group, 0)
            assert slots == list(range(first, first + len(slots)))
        for group, ids in plan.decode:
            assert ids, "an empty group"
            for slot, request_id in enumerate(ids):
                assert self.rows[group][slot] == request_id
                assert self.read[request_id] == self.prompt[request_id], "decoded before its prompt was read"
        for chunk in plan.prefill:
            self.prefill(chunk)
        assert all(chunk.last for chunk in plan.prefill[:-1]), "two unfinished prompts"
        for request_id in plan.sampled:
            self.left[request_id] -= 1
        for request_id in [r for r in plan.sampled if self.left[r] == 0]:
            self.leave(request_id)

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
        assert sum(any(rows) for rows in self.rows.values()) <= self.scheduler.max_groups

    def bytes(self, reading: Chunk) -> int:
        """Rows as large as the largest of their group, and the prompt that is being read."""
        total = self.demand[reading.request_id].prompt_bytes
        for rows in self.rows.values():
            sizes = [self.demand[row].row_bytes for row in rows if row is not None]
            total += len(sizes) * max(sizes, default=0)
        return total

    def leave(self, request_id: str) -> None:
        self.apply(self.demand[request_id].group, self.scheduler.finish(request_id))
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


DEMANDS = st.builds(Demand, group=st.sampled_from("xyz"), row_bytes=st.integers(0, 60), prompt_bytes=st.integers(0, 40))
ARRIVALS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 7), DEMANDS), max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    max_num_seqs=st.integers(1, 5),
    extra_budget=st.integers(1, 11),
    max_groups=st.integers(1, 3),
    traffic=st.lists(st.tuples(ARRIVALS, st.integers(0, 30)), min_size=1, max_size=25),
)
def test_invariants_over_random_traffic(max_num_seqs, extra_budget, max_groups, traffic):
    simulation = Simulation(max_num_seqs, max_num_seqs + extra_budget, max_groups)
    scheduler = simulation.scheduler
    for arrivals, abort in traffic:
        for prompt, new_tokens, demand in arrivals:
            simulation.add(prompt, new_tokens, demand)
        unfinished = list(simulation.prompt)
        if unfinished and abort < len(unfinished):
            victim = unfinished[abort]
            simulation.leave(victim)
            if victim not in simulation.started:
                simulation.arrived.remove(victim)
                simulation.arrived.append(victim + "(aborted)")
        simulation.run(scheduler.schedule())
    steps = 0
    work = sum(simulation.prompt[r] - simulation.read[r] + simulation.left[r] for r in simulation.prompt)
    while scheduler.has_work():
        simulation.run(scheduler.schedule())
        steps += 1
        assert steps <= work, "a step without progress"
    expected = [r for r in simulation.arrived if not r.endswith("(aborted)")]
    assert simulation.started == expected, "not first come first served"
    assert not simulation.prompt
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert not scheduler.tables


def test_a_demand_that_never_fits_is_refused():
    scheduler = Scheduler(max_num_seqs=2, max_batched_tokens=5, max_queue=10, max_bytes=10)
    with pytest.raises(ValueError, match="needs 11 bytes, more than the 10"):
        scheduler.add("a", 2, Demand(row_bytes=7, prompt_bytes=4))
    assert not scheduler.has_work()


def test_what_waits_for_room_is_not_overtaken():
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=50, max_queue=10, max_bytes=10)
    for name, size in [("a", 6), ("large", 9), ("small", 1)]:
        scheduler.add(name, 2, Demand(row_bytes=size))
    assert scheduler.schedule().sampled == ["a"]
    assert (scheduler.schedule().sampled, scheduler.num_waiting) == (["a"], 2)
    scheduler.finish("a")
    assert (scheduler.schedule().sampled, scheduler.num_waiting) == (["large"], 1)


def test_every_decoding_sequence_runs_in_every_step():
    scheduler = Scheduler(max_num_seqs=3, max_batched_tokens=5, max_queue=10)
    scheduler.add("a", 2)
    assert scheduler.schedule().sampled == ["a"]
    scheduler.add("long", 100)
    scheduler.add("b", 1)
    for _ in range(10):
        plan = scheduler.schedule()
        assert plan.decoding == ["a"]
        assert [(chunk.request_id, chunk.count) for chunk in plan.prefill] == [("long", 4)]


def test_a_chunk_ends_where_the_budget_does():
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=8, max_queue=10)
    for name, prompt in [("a", 3), ("b", 7), ("c", 2)]:
        scheduler.add(name, prompt)
    first = scheduler.schedule()
    assert [(c.request_id, c.start, c.count, c.last) for c in first.prefill] == [("a", 0, 3, True), ("b", 0, 5, False)]
    second = scheduler.schedule()
    assert second.decoding == ["a"]
    assert [(c.request_id, c.start, c.count, c.last) for c in second.prefill] == [("b", 5, 2, True), ("c", 0, 2, True)]


def test_queue_is_bounded_and_frees():
    scheduler = Scheduler(max_num_seqs=1, max_batched_tokens=8, max_queue=2)
    for name in "abc":
        scheduler.add(name, 1)
    with pytest.raises(QueueFullError):
        scheduler.add("d", 1)
    scheduler.finish("b")
    scheduler.add("d", 1)
    assert scheduler.num_waiting == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_num_seqs": 0, "max_batched_tokens": 8, "max_queue": 1}, "max_num_seqs=0"),
        ({"max_num_seqs": 8, "max_batched_tokens": 8, "max_queue": 1}, "max_batched_tokens=8"),
        ({"max_num_seqs": 1, "max_batched_tokens": 8, "max_queue": -1}, "max_queue=-1"),
    ],
)
def test_impossible_limits_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(**kwargs)


def test_bad_requests_are_refused():
    scheduler = Scheduler(2, 8, 2)
    scheduler.add("a", 1)
    with pytest.raises(ValueError, match="in use"):
        scheduler.add("a", 1)
    with pytest.raises(ValueError, match="prompt_tokens=0"):
        scheduler.add("b", 0)
    with pytest.raises(KeyError):
        scheduler.finish("b")


def test_release_moves_the_last_decoding_and_then_the_unfinished_prompt():
    table = SlotTable(4)
    for name in "abcp":
        table.take(name)
    table.decoding = 3
    assert table.release("a") == Release(moves=((2, 0), (3, 2)), freed=3)
    assert table.ids == ["c", "b", "p"]
    assert table.release("p") == Release(moves=(), freed=2)
    assert table.release("b") == Release(moves=(), freed=1)
