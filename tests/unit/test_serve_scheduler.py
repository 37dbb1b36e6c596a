"""The scheduler's promises, checked over random traffic against a plain model of the slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache_manager import Release, SlotTable
from serve.scheduler import Plan, QueueFullError, Scheduler


class Simulation:
    """A device of strings: which sequence's state lies in which row, and how much of its prompt was read."""

    def __init__(self, max_num_seqs: int, budget: int, max_queue: int) -> None:
        self.scheduler = Scheduler(max_num_seqs, budget, max_queue)
        self.rows: list[str | None] = [None] * max_num_seqs
        self.prompt: dict[str, int] = {}
        self.read: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.started: list[str] = []
        self.arrived: list[str] = []

    def add(self, prompt: int, new_tokens: int) -> None:
        request_id = f"r{len(self.arrived)}"
        self.scheduler.add(request_id, prompt)
        self.arrived.append(request_id)
        self.prompt[request_id], self.left[request_id], self.read[request_id] = prompt, new_tokens, 0

    def run(self, plan: Plan) -> None:
        assert plan.num_tokens <= self.scheduler.max_batched_tokens
        assert [chunk.slot for chunk in plan.prefill] == list(
            range(len(plan.decode), len(plan.decode) + len(plan.prefill))
        )
        for slot, request_id in enumerate(plan.decode):
            assert self.rows[slot] == request_id
            assert self.read[request_id] == self.prompt[request_id], "decoded before its prompt was read"
        for chunk in plan.prefill:
            assert chunk.count >= 1
            assert chunk.start == self.read[chunk.request_id]
            if chunk.start == 0:
                assert self.rows[chunk.slot] is None, "slot not empty"
                self.rows[chunk.slot] = chunk.request_id
                self.started.append(chunk.request_id)
            assert self.rows[chunk.slot] == chunk.request_id
            self.read[chunk.request_id] += chunk.count
            assert chunk.last == (self.read[chunk.request_id] == self.prompt[chunk.request_id])
        assert all(chunk.last for chunk in plan.prefill[:-1]), "two unfinished prompts"
        for request_id in plan.sampled:
            self.left[request_id] -= 1
        for request_id in [r for r in plan.sampled if self.left[r] == 0]:
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        self.apply(self.scheduler.finish(request_id))
        del self.prompt[request_id]

    def apply(self, release: Release | None) -> None:
        if release is None:
            return
        for source, target in release.moves:
            self.rows[target] = self.rows[source]
        self.rows[release.freed] = None
        occupied = [row for row in self.rows if row is not None]
        assert self.rows[: len(occupied)] == occupied, "running sequences are not compact"
        assert len(set(occupied)) == len(occupied), "one sequence in two slots"
        assert occupied == self.scheduler.slots.ids


ARRIVALS = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 7)), max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    max_num_seqs=st.integers(1, 5),
    extra_budget=st.integers(1, 11),
    traffic=st.lists(st.tuples(ARRIVALS, st.integers(0, 30)), min_size=1, max_size=25),
)
def test_invariants_over_random_traffic(max_num_seqs, extra_budget, traffic):
    simulation = Simulation(max_num_seqs, max_num_seqs + extra_budget, max_queue=1000)
    scheduler = simulation.scheduler
    for arrivals, abort in traffic:
        for prompt, new_tokens in arrivals:
            simulation.add(prompt, new_tokens)
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


def test_every_decoding_sequence_runs_in_every_step():
    scheduler = Scheduler(max_num_seqs=3, max_batched_tokens=5, max_queue=10)
    scheduler.add("a", 2)
    assert scheduler.schedule().sampled == ["a"]
    scheduler.add("long", 100)
    scheduler.add("b", 1)
    for _ in range(10):
        plan = scheduler.schedule()
        assert plan.decode == ("a",)
        assert [(chunk.request_id, chunk.count) for chunk in plan.prefill] == [("long", 4)]


def test_a_chunk_ends_where_the_budget_does():
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=8, max_queue=10)
    for name, prompt in [("a", 3), ("b", 7), ("c", 2)]:
        scheduler.add(name, prompt)
    first = scheduler.schedule()
    assert [(c.request_id, c.start, c.count, c.last) for c in first.prefill] == [("a", 0, 3, True), ("b", 0, 5, False)]
    second = scheduler.schedule()
    assert second.decode == ("a",)
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
