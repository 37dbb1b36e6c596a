"""What the scheduler refuses, how slots are assigned, and what goes through the model together."""

import pytest

from attnzoo.kvcache.choice import read_choice
from serve.runner import _batches
from serve.scheduling import Chunk, Release, Scheduler, SlotTable


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


def test_release_moves_the_last_decoding_and_then_an_unfinished_prompt():
    table = SlotTable(6)
    for name in "abcpqr":
        table.take(name)
    table.decoding = 3
    assert table.release("a") == Release(moves=((2, 0), (5, 2)), freed=5)
    assert table.ids == ["c", "b", "r", "p", "q"]
    assert table.promote(["q", "r"]) == [(2, 4), (3, 4)]
    assert (table.ids, table.decoding) == (["c", "b", "q", "r", "p"], 4)
    assert table.release("p") == Release(moves=(), freed=4)
    assert table.release("b") == Release(moves=((3, 1),), freed=3)


def test_cells_of_several_prompts_go_through_the_model_together():
    """The first cells of all, then the second ones; prompts of compressed caches one by one, each whole."""
    for choice, together in (({"policy": "full"}, True), ({"policy": "d2o"}, False)):
        group = read_choice(choice)
        cells = [("a", 0, 0, 8), ("a", 0, 8, 8), ("b", 1, 0, 8), ("b", 1, 8, 5)]
        chunks = [Chunk(name, group, slot, start, count, last=False) for name, slot, start, count in cells]
        found = [[(chunk.request_id, chunk.start) for chunk in batch] for batch in _batches(chunks)]
        if together:
            assert found == [[("a", 0), ("b", 0)], [("a", 8), ("b", 8)]]
        else:
            assert found == [[("a", 0)], [("a", 8)], [("b", 0)], [("b", 8)]]
