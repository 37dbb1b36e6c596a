"""The scheduler's promises, checked over random traffic against a plain model of the slots."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scheduling import PATIENCE, Demand, QueueFullError, Scheduler
from tests.helpers.scheduling import Simulation

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
        simulation.abort(abort)
        simulation.step(limit)
    assert not simulation.set_aside, "nobody is more urgent, and nobody grows"
    simulation.end()


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
        simulation.abort(abort)
        for grown in growth:
            simulation.grow(*grown)
        simulation.step(limit)
    simulation.end()


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


def test_what_a_more_urgent_request_waits_for_is_not_given_to_others():
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=50, max_queue=10, max_bytes=10)
    scheduler.add("runs", 2, Demand(own_bytes=6), movable=False)
    scheduler.schedule()
    scheduler.add("usual", 2, Demand(own_bytes=3))
    scheduler.add("urgent", 30, Demand(own_bytes=8), priority=-1)
    scheduler.add("takes nothing", 2)
    assert scheduler.victims() == []
    assert scheduler.schedule().sampled == ["runs", "takes nothing"]
    scheduler.finish("runs")
    assert scheduler.schedule().sampled == ["takes nothing", "urgent"]


def test_what_was_set_aside_goes_on_before_others_take_its_room():
    scheduler = Scheduler(max_num_seqs=2, max_batched_tokens=50, max_queue=10)
    scheduler.add("usual", 2)
    scheduler.add("stays", 2, movable=False)
    scheduler.schedule()
    scheduler.add("urgent", 2, priority=-1)
    assert scheduler.victims() == ["usual"]
    scheduler.set_aside("usual", kept=True)
    scheduler.add("later", 1)
    plan = scheduler.schedule()
    assert plan.sampled == ["stays", "urgent"]
    scheduler.finish("urgent")
    assert scheduler.victims() == []
    plan = scheduler.schedule()
    assert [resume.request_id for resume in plan.resumed] == ["usual"]
    assert scheduler.schedule().sampled == ["stays", "usual"]
    with pytest.raises(ValueError, match="'later' is waiting, with 1 tokens of its prompt left"):
        scheduler.set_aside("later", kept=False)


def test_as_few_as_possible_make_way():
    """Not the small one, if the large one is enough."""
    scheduler = Scheduler(max_num_seqs=4, max_batched_tokens=50, max_queue=10, max_bytes=10)
    scheduler.add("large", 2, Demand(own_bytes=7), priority=1)
    scheduler.add("small", 2, Demand(own_bytes=3), priority=1)
    scheduler.schedule()
    scheduler.add("urgent", 2, Demand(own_bytes=6))
    assert scheduler.victims() == ["large"]
