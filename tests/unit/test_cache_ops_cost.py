"""Models of bytes and FLOPs of compressed caches' operations, against the tensors they read and write."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.ops.accumulated_attention import Tables, accumulated_attention
from attnzoo.ops.accumulated_attention.cost import AccumulatedSizes, accumulated_cost
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import Arrival, MergeRule, Slots, evict_merge, evict_merge_step
from attnzoo.ops.evict_merge.cost import MergeSizes, merge_cost, step_cost
from attnzoo.ops.paged_decode import Entries, paged_decode
from attnzoo.ops.paged_decode.cost import DecodeSizes, SegmentSizes, decode_cost, scratch_bytes

B, T, N, K, H = 2, 1, 6, 3, 8
DTYPES = [torch.float32, torch.bfloat16]


def nbytes(*tensors: Tensor | None) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def sizes_of(part: Entries) -> SegmentSizes:
    return SegmentSizes(
        slots=part.slots,
        key_dim=part.keys_BKSC.shape[3],
        value_dim=part.values_BKSV.shape[3],
        position_heads=part.positions_BKS.shape[1],
        merge_counts=part.log_counts_BKS is not None,
        channels=part.channels_BKC is not None,
        value_channels=part.value_channels_BKV is not None,
    )


def entries(slots: int, key: int, value: int, heads: int, dtype: torch.dtype, merge_counts: bool) -> Entries:
    return Entries(
        keys_BKSC=torch.randn(B, K, slots, key).to(dtype),
        values_BKSV=torch.randn(B, K, slots, value).to(dtype),
        positions_BKS=torch.arange(slots).expand(B, heads, slots).contiguous(),
        channels_BKC=None if key == H else torch.arange(key).expand(B, K, key).contiguous(),
        value_channels_BKV=None if value == H else torch.arange(value).expand(B, K, value).contiguous(),
        log_counts_BKS=torch.zeros(B, K, slots) if merge_counts else None,
    )


def entry_bytes(part: Entries) -> int:
    return nbytes(
        part.keys_BKSC,
        part.values_BKSV,
        part.positions_BKS,
        part.channels_BKC,
        part.value_channels_BKV,
        part.log_counts_BKS,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [5, H])
@pytest.mark.parametrize("options", [False, True])
def test_paged_decode(key, options, dtype):
    prefix = entries(37, key, 6 if options else H, K, dtype, options)
    tail = entries(11, H, H, 1, dtype, False)
    q, at = torch.randn(B, N, T, H).to(dtype), torch.full((B, T), 40)
    bias = torch.randn(B, N, T, 48) if options else None
    probe = torch.randn(B, K, key).to(dtype) if options else None
    rest = {"query_positions_BT": at, "bias_BNTS": bias, "probe_BKC": probe, "accumulated_attention": options}
    out = paged_decode(q, prefix, tail, impl="torch", **rest)
    cost = decode_cost(
        DecodeSizes(
            batch=B,
            tokens=T,
            heads=N,
            kv_heads=K,
            head_dim=H,
            width=dtype.itemsize,
            segments=(sizes_of(prefix), sizes_of(tail)),
            probe_dim=key if options else 0,
            bias_width=4 if options else 0,
            accumulated_attention=options,
        )
    )
    assert cost.bytes_read == nbytes(q, at, bias, probe) + entry_bytes(prefix) + entry_bytes(tail)
    assert cost.bytes_written == nbytes(out.out_BNTH, out.accumulated_BKS, out.dots_BKP)
    assert cost.bytes_moved == cost.bytes_read + cost.bytes_written
    assert cost.flops == flops(lambda: paged_decode(q, prefix, tail, impl="torch", **rest))
    assert cost.intensity == cost.flops / cost.bytes_moved


@pytest.mark.parametrize("accumulated", [False, True])
def test_what_the_kernels_of_paged_decode_keep(accumulated):
    pytest.importorskip("triton", reason="the package triton is not installed")
    from attnzoo.ops.paged_decode.launch import Call, Layout

    prefix, tail = entries(203, 5, H, K, torch.bfloat16, False), entries(70, H, H, 1, torch.bfloat16, False)
    q, at = torch.randn(B, N, T, H).bfloat16(), torch.full((B, T), 40)
    call = Call.of(q, prefix, tail, at, None, None, accumulated, Layout(gpu="sm_90", splits=(16, 2)))
    assert call.splits.total == 7 + 3
    kept = nbytes(call.partial.out, call.partial.log_sums, call.partial.scores, call.totals_BKL)
    assert kept == scratch_bytes(
        batch=B, tokens=T, heads=N, head_dim=H, splits=call.splits.total, slots=273, accumulated_attention=accumulated
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulated_attention(dtype):
    tokens, slots, rows = 5, 19, 7
    q, k = torch.randn(B, N, tokens, H).to(dtype), torch.randn(B, K, slots, H).to(dtype)
    at, places = torch.arange(14, 19).expand(B, tokens).contiguous(), torch.arange(19).expand(B, 1, 19).contiguous()
    tables = Tables(*(torch.randn(N, *shape).to(dtype) for shape in ((H,), (rows, H), (rows,))))
    merge_counts = torch.zeros(B, K, slots)
    mask = Mask(query_positions_BT=at, key_positions_BKS=places)
    accumulated = accumulated_attention(q, k, mask=mask, tables=tables, log_counts_BKS=merge_counts, impl="torch")
    sizes = {"batch": B, "tokens": tokens, "heads": N, "kv_heads": K, "head_dim": H, "width": dtype.itemsize}
    cost = accumulated_cost(
        AccumulatedSizes(slots=slots, position_heads=1, merge_counts=True, table_rows=rows, **sizes)
    )
    given = (q, k, at, places, merge_counts, tables.content_bias_NH, tables.table_NPH, tables.table_bias_NP)
    assert cost.bytes_read == nbytes(*given)
    assert cost.bytes_written == accumulated.nbytes
    seen = int(mask.visible(tokens, k.shape[2], q.device)[0].sum())
    plain = accumulated_cost(AccumulatedSizes(slots=slots, **sizes))
    assert plain.bytes_read == nbytes(q, k)
    assert plain == accumulated_cost(AccumulatedSizes(slots=slots, pairs=seen, **sizes))
    # One product of all queries with all keys has 2 H FLOPs a pair; the pairs that are seen, twice over:
    product = flops(lambda: q.unflatten(1, (K, -1)) @ k[:, :, None].mT)
    assert plain.flops * tokens * slots == 2 * product * seen
    known = accumulated_cost(AccumulatedSizes(slots=slots, sums_known=True, **sizes))
    assert known.flops * 2 == plain.flops
    assert known.bytes_read - plain.bytes_read == B * N * tokens * 4
    table = flops(lambda: q.transpose(0, 1).flatten(1, 2) @ tables.table_NPH.mT)
    assert cost.flops - plain.flops == table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge_counts", [False, True])
def test_evict_merge(merge_counts, dtype):
    count, kept = 19, 8
    keys, values = torch.randn(B, K, count, H).abs().to(dtype), torch.randn(B, K, count, 5).to(dtype)
    keep = (torch.arange(count) < kept).expand(B, K, count).contiguous()
    threshold, counts = torch.zeros(B, K), torch.ones(B, K, count) if merge_counts else None
    rule = MergeRule(kind="official", beta=0.0)  # the threshold stays 0, which keys without negative numbers pass
    rest = {"keep_BKS": keep, "evict_BKS": ~keep, "slots": 10, "rule": rule, "merge_counts_BKS": counts}
    merged = evict_merge(keys, values, threshold_BK=threshold, impl="torch", **rest)
    cost = merge_cost(
        MergeSizes(
            batch=B,
            kv_heads=K,
            entries=count,
            kept=kept,
            evicted=count - kept,
            merged=count - kept,
            slots=10,
            key_dim=H,
            value_dim=5,
            width=dtype.itemsize,
            merge_counts=merge_counts,
        )
    )
    assert cost.bytes_read == nbytes(keys, values, keep, ~keep, threshold, counts)
    results = (merged.keys_BKMC, merged.values_BKMV, merged.source_BKM, merged.merge_counts_BKM, merged.threshold_BK)
    assert cost.bytes_written == nbytes(*results)
    products = flops(lambda: keys[:, :, kept:] @ keys[:, :, :kept].mT)
    assert cost.flops == products + 2 * B * K * (count - kept + kept) * (H + 5)


@pytest.mark.parametrize("merge_counts", [False, True])
def test_evict_merge_step(merge_counts):
    """Bytes of the rows that a step changes are found by comparing the state before and after."""
    slots, dtype = 19, torch.bfloat16
    keys, values = torch.randn(B, K, slots, H).abs().to(dtype), torch.randn(B, K, slots, 5).to(dtype)
    state = Slots(
        keys_BKPC=keys,
        values_BKPV=values,
        norms_BKP=keys.float().norm(dim=-1).to(dtype),
        merge_counts_BKP=torch.full((B, K, slots), 2.0) if merge_counts else None,
    )
    victims = torch.zeros(B, K, dtype=torch.int64)
    dots = (keys[:, :, :1].float() @ keys.float().mT)[:, :, 0]
    arrival = Arrival(
        key_BKC=torch.full((B, K, H), 7.0).to(dtype), value_BKV=torch.full((B, K, 5), 7.0).to(dtype), slot_BK=victims
    )
    before = [x.clone() for x in (state.keys_BKPC, state.values_BKPV)]
    threshold = torch.full((B, K), -math.inf)
    rest = {"victim_BK": victims, "dots_BKP": dots, "arrival": arrival, "threshold_BK": threshold}
    after = evict_merge_step(state, rule=MergeRule(kind="official"), impl="torch", **rest)
    changed = [
        int((now != old).any(-1).sum()) * now[0, 0, 0].nbytes
        for now, old in zip((state.keys_BKPC, state.values_BKPV), before, strict=True)
    ]
    sizes = {
        "batch": B,
        "kv_heads": K,
        "slots": slots,
        "key_dim": H,
        "value_dim": 5,
        "width": 2,
        "merge_counts": merge_counts,
    }
    cost = step_cost(**sizes)
    numbers = (
        B * K * (3 * 2 + (2 * 4 if merge_counts else 0))
    )  # norms of target, victim and arrival; merge counts of two
    assert cost.bytes_written == sum(changed) + after.nbytes + numbers
    rows = 3 * nbytes(arrival.key_BKC, arrival.value_BKV)
    given = nbytes(state.norms_BKP, dots, victims, arrival.slot_BK, threshold)
    assert cost.bytes_read == given + rows + (B * K * 8 if merge_counts else 0)
