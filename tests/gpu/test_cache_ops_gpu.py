"""The kernels of compressed caches on a real device: the checks of the interpreter, at real sizes, and how fast."""

import pytest
import torch

from attnzoo.ops.evict_merge import MergeRule
from attnzoo.ops.paged_decode import Entries, paged_decode
from attnzoo.ops.paged_decode.cost import DecodeSizes, SegmentSizes, decode_cost
from tests.gpu.timing import milliseconds
from tests.helpers.cache_kernels import (
    DECODE_CASES,
    MASS_CASES,
    RULES,
    check_decode,
    check_mass,
    check_merge,
    check_pages,
    check_step,
    decode_inputs,
    moved,
    named,
    run_decode,
)

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LARGE_DECODE = {
    # B, K, G, T, slots of the prefix, of the tail, H, C, V
    "long": ((2, 3, 3, 1, 3001, 257, 64, 38, 64), {"accumulated": True, "probe": True, "merge_counts": True}),
    "wide heads": ((2, 2, 4, 2, 513, 129, 128, 64, 96), {"accumulated": True, "bias": True}),
    "widest heads": ((1, 2, 1, 1, 513, 129, 256, 128, 256), {"probe": True}),
    "more rows than a program takes": ((1, 2, 4, 33, 301, 77, 64, 32, 64), {"accumulated": True}),
}
LARGE_MASS = {
    "long": ((2, 3, 3, 700, 700, 64), {}),
    "wide heads, tables": ((1, 2, 2, 333, 511, 128), {"relative": True, "merge_counts": True, "counts": True}),
    "widest heads": ((1, 1, 2, 130, 300, 256), {"window": 50, "sinks": 3}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*DECODE_CASES, *LARGE_DECODE])
def test_paged_decode(name, dtype):
    check_decode(*(DECODE_CASES | LARGE_DECODE)[name], DEVICE, dtype, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages(dtype):
    check_pages(DEVICE, dtype, (2, 3, 3, 1, 1000, 200, 64, 38, 64), 64, (64, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_is_repeatable(dtype):
    inputs = {name: moved(x, DEVICE, dtype) for name, x in decode_inputs(*LARGE_DECODE["long"]).items()}
    first, second = named(run_decode(inputs)), named(run_decode(inputs))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*MASS_CASES, *LARGE_MASS])
def test_accumulated_attention(name, dtype):
    check_mass(*(MASS_CASES | LARGE_MASS)[name], DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge_counts", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_evict_merge(rule, merge_counts, dtype):
    check_merge((2, 3, 1001, 64, 64), RULES[rule], merge_counts, DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [38, 128, 256])
def test_evict_merge_of_other_widths(width, dtype):
    check_merge((1, 2, 301, width, 64), MergeRule(), True, DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge_counts", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_evict_merge_step(rule, merge_counts, dtype):
    check_step((4, 3, 1501, 38, 64), RULES[rule], merge_counts, DEVICE, dtype)


@pytest.mark.parametrize(
    ("keep", "width"), [(8192, 64), (1638, 64), (8160, 32), (1638, 32)], ids=["full", "20 %", "50 %", "20 % of 50 %"]
)
@pytest.mark.parametrize("batch", [1, 16])
def test_how_fast(batch, keep, width, capsys):
    """Prints milliseconds of a step of one layer and the bandwidth that this is of the bytes it must move, beside the
    implementation "torch"; asserts nothing. Sizes of SmolLM2-135M at 8k tokens of context."""
    kv_heads, heads, head_dim, tail = 3, 9, 64, 32

    def part(slots: int, key_dim: int) -> Entries:
        shape = (batch, kv_heads, slots)
        picks = torch.rand(batch, kv_heads, head_dim, device=DEVICE).argsort(-1)[..., :key_dim].sort(-1).values
        return Entries(
            keys_BKSC=torch.randn(*shape, key_dim, device=DEVICE, dtype=torch.bfloat16),
            values_BKSV=torch.randn(*shape, head_dim, device=DEVICE, dtype=torch.bfloat16),
            positions_BKS=torch.arange(slots, device=DEVICE).expand(batch, 1, slots).contiguous(),
            channels_BKC=None if key_dim == head_dim else picks,
        )

    prefix, last = part(keep, width), part(tail, head_dim)
    q = torch.randn(batch, heads, 1, head_dim, device=DEVICE, dtype=torch.bfloat16)
    at = torch.full((batch, 1), 10_000, device=DEVICE)
    cost = decode_cost(
        DecodeSizes(
            batch=batch,
            tokens=1,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            width=2,
            segments=tuple(
                SegmentSizes(
                    slots=x.slots,
                    key_dim=x.keys_BKSC.shape[3],
                    value_dim=head_dim,
                    position_heads=1,
                    channels=x.channels_BKC is not None,
                )
                for x in (prefix, last)
            ),
        )
    )
    times = {}
    for impl in ("triton", "torch"):
        times[impl] = milliseconds(lambda i=impl: paged_decode(q, prefix, last, query_positions_BT=at, impl=i), 50)
    with capsys.disabled():
        rate = cost.bytes_moved / times["triton"] / 1e6
        print(f"\n{torch.cuda.get_device_name()} B={batch} {keep} x {width}: {times} ms, {rate:.0f} GB/s")
