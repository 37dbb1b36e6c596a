"""Rows of the full cache take the memory that their sequences fill, by the system's own accounting."""

import subprocess
import sys

import pytest
import torch

from attnzoo.models import DecoderConfig, DecoderLM
from serve.arena import PAGE, Arena, ElasticState
from serve.engine import Engine, EngineConfig
from serve.pools import SlotPool
from serve.request import CacheMemoryError
from serve.scheduling import Release
from tests.helpers.engines import greedy
from tests.helpers.resident import resident_at
from tests.helpers.serving import small_model, tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rows take all their memory from the start")

VARIANTS = ["mha", "rcmha", "linear", "mesa", {"kind": "mha", "window": 40, "sinks": 2}]
LENGTHS = (1, 63, 64, 65, 300)


def model_of(attention, dtype=torch.float32):
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=64, model_dim=128, num_layers=2, attention=attention)
    return DecoderLM(config).eval().to(dtype)


def filled(pool: SlotPool, lengths) -> None:
    """Every slot gets a sequence of its own, one after the other."""
    for slot, length in enumerate(lengths):
        pool._extend(torch.arange(length)[None] % 64, slot, [0])


def taken(pool: SlotPool) -> int:
    """Bytes of the arena in memory."""
    first = next(
        (x for x in pool.state.tensors().values() if not any(x is small for small in pool._elastic._small)), None
    )
    return 0 if first is None else resident_at(first.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", VARIANTS, ids=str)
@torch.inference_mode()
def test_bytes_that_are_counted_are_those_that_the_system_has_given(attention, dtype):
    pool = SlotPool(model_of(attention, dtype), 8, 4000)
    elastic = pool._elastic
    assert taken(pool) == 0
    assert pool.nbytes == elastic.always
    filled(pool, LENGTHS)
    assert pool.lengths == [*LENGTHS, 0, 0, 0]
    assert taken(pool) == pool.nbytes - elastic.always == sum(map(pool.row_bytes, LENGTHS))
    pool.release("", Release(moves=((4, 1),), freed=4))  # the longest takes the place of a short one
    assert pool.lengths == [1, 300, 64, 65, 0, 0, 0, 0]
    assert taken(pool) == pool.nbytes - elastic.always
    pool.exchange((0, 1))
    assert pool.lengths == [300, 1, 64, 65, 0, 0, 0, 0]
    assert taken(pool) == pool.nbytes - elastic.always
    pool.clear()
    assert taken(pool) == 0
    assert not any(x.any() for x in pool.state.tensors().values())


@pytest.mark.parametrize("attention", VARIANTS, ids=str)
@torch.inference_mode()
def test_rows_that_move_hold_what_they_held(attention):
    pool = SlotPool(model_of(attention), 5, 1000)
    filled(pool, LENGTHS)
    before = [pool.state.rows(slice(slot, slot + 1)).clone().tensors() for slot in range(5)]
    pool.exchange((0, 4))
    pool.release("", Release(moves=((1, 3), (2, 1)), freed=2))
    for slot, source in ((0, 4), (3, 1), (1, 2), (4, 0)):
        after = pool.state.rows(slice(slot, slot + 1)).tensors()
        assert all(torch.equal(x, before[source][name]) for name, x in after.items()), (slot, source)
    assert not any(x[2].any() for x in pool.state.tensors().values())


def test_long_rows_cost_nothing_until_they_are_filled():
    """Rows of 2 TiB together, as a model of a million tokens would have."""
    elastic = ElasticState(model_of("mha"), 1024, 1 << 20)
    assert sum(x.nbytes for x in elastic.state.tensors().values()) > 2 << 40
    assert elastic.nbytes(1) == 2 * 2 * elastic.state.tensors()["layers.0.mixing.keys_BKSH"].shape[1] * PAGE


def test_an_arena_gives_back_whole_pages_alone():
    arena = Arena(4 * PAGE)
    x = arena.zeros([4 * PAGE], torch.uint8)
    x.fill_(7)
    arena.release(PAGE - 1, 3 * PAGE + 1)
    assert x.view(4, PAGE).sum(1).tolist() == [7 * PAGE, 0, 0, 7 * PAGE]


def test_a_request_waits_until_its_pages_fit_into_the_budget():
    model = small_model("mha", dim=256, layers=4, max_len=2048)
    config = EngineConfig(checkpoint="none", max_num_seqs=8, max_batched_tokens=1024, cache_mib=8)
    engine = Engine(config, model=model, tokenizer=tokenizer())
    row = engine.runner.full.row_bytes(420)
    fit = (8 << 20) // row
    assert 1 < fit < 8
    for index in range(8):
        engine.add_request(str(index), [5 + index] * 400, greedy(20))
    together = most = 0
    while engine.has_work():
        engine.step()
        together = max(together, engine.scheduler.num_running)
        most = max(most, engine.runner.pool_bytes)
    assert together == fit
    assert most <= 8 << 20
    assert engine.runner.pool_bytes == engine.runner.full._elastic.always
    with pytest.raises(CacheMemoryError, match=r"needs .* MiB, and there are cache_mib=8; shorten"):
        engine.add_request("long", [5] * 2000, greedy(20))


REFUSED = """
import resource, logging, sys
import torch
from attnzoo.models import DecoderConfig, DecoderLM
from serve.pools import SlotPool

model = DecoderLM(DecoderConfig(vocab_size=64, model_dim=128, num_layers=2, attention="mha"))
now = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (now + (192 << 20), now + (192 << 20)))
logging.basicConfig(stream=sys.stdout)
pool = SlotPool(model, 8, 4000 if sys.argv[1] == "fits" else 100_000)
print(pool._elastic is None, pool.nbytes == pool.state.nbytes())
"""


def test_where_the_system_refuses_the_mapping_rows_take_their_memory_at_once_and_the_log_says_so():
    """4,000 tokens fit below the limit as pages or whole, a hundred thousand in no way."""
    fits = subprocess.run([sys.executable, "-c", REFUSED, "fits"], capture_output=True, text=True, timeout=120)
    assert fits.stdout.split() == ["False", "False"], fits.stderr
    beyond = subprocess.run([sys.executable, "-c", REFUSED, "beyond"], capture_output=True, text=True, timeout=120)
    assert "each of 8 sequences takes the memory of 100000 tokens from the start" in beyond.stdout + beyond.stderr
    assert "max_num_seqs=8 sequences of max_model_len=100000 tokens: a state with a tensor of" in beyond.stderr
