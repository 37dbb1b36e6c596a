"""The order of batches: the same for any number of processes, every token once an epoch, resumed exactly."""

import json

import numpy as np
import pytest
import torch

from train.data import BatchStream


def stream(seed: int = 0) -> BatchStream:
    return BatchStream(np.arange(1003, dtype=np.uint16), 10, seed)


def global_batches(world: int, count: int) -> list[list[list[int]]]:
    """`count` global batches of 12 blocks, gathered from `world` processes."""
    ranks = [stream() for _ in range(world)]
    batches = []
    for _ in range(count):
        parts = [ranks[rank].next(12 // world, rank, world)[0] for rank in range(world)]
        batches.append(torch.cat(parts).tolist())
    return batches


def test_order_does_not_depend_on_the_number_of_processes():
    one = global_batches(1, 20)
    assert one == global_batches(2, 20) == global_batches(4, 20)


@pytest.mark.parametrize("size", [1003, 1000, 1001, 1009, 100, 11, 10])
def test_an_epoch_visits_every_token_once_and_the_next_in_other_blocks(size):
    """Tokens are their places; all but a rest shorter than a block are inputs once an epoch, and so targets."""
    batches, seen = BatchStream(np.arange(size, dtype=np.uint16), 10, 0), []
    for _ in range(4):
        pairs = [batches.next(1, 0, 1) for _ in range(size // 10)]
        tokens, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert tokens.dtype == torch.int64
        assert torch.equal(targets, (tokens + 1) % size)
        places = tokens.flatten().tolist()
        assert len(set(places)) == len(places) == size - size % 10
        seen.append(tuple(sorted(row[0] % 10 for row in tokens.tolist())))
    assert len(set(seen)) > 1, "every epoch has the same blocks"


def test_resuming_continues_exactly():
    original, resumed = stream(), stream()
    for _ in range(17):
        original.next(12, 0, 1)
    resumed.load(json.loads(json.dumps(original.state())))
    for _ in range(20):
        assert torch.equal(original.next(12, 0, 1)[0], resumed.next(12, 0, 1)[0])


@pytest.mark.parametrize(("batch", "rank", "world"), [(4, 2, 2), (4, -1, 2), (0, 0, 1)])
def test_impossible_batches_are_refused(batch, rank, world):
    with pytest.raises(ValueError, match=f"batch_size={batch}, rank={rank}, world={world}"):
        stream().next(batch, rank, world)
    with pytest.raises(ValueError, match="one global batch takes 500 blocks of 10 tokens"):
        stream().next(500, 0, 1)


def test_seed_changes_the_order():
    assert not torch.equal(stream(0).next(12, 0, 1)[0], stream(1).next(12, 0, 1)[0])
