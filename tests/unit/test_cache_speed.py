"""Speed and memory of compressed caches: what is claimed, and the roofline held against the operations' own costs."""

import time

import pytest
import torch

from attnzoo.kvcache import build_cache, compressed, merging
from attnzoo.models import CompiledDecode
from attnzoo.ops.common.cost import OpCost
from attnzoo.ops.evict_merge.cost import step_cost as merge_step_cost
from attnzoo.ops.paged_decode.cost import DecodeSizes, SegmentSizes, decode_cost
from attnzoo.planner.chips import CHIPS
from scripts.caches.models import random_reader
from scripts.caches.protocol import prefill
from scripts.caches.roofline import attention_cost, step_cost
from scripts.caches.speed import PROFILED, Speed, SpeedSizes, measure_speed, weight_bytes
from scripts.caches.step_parts import step_parts
from scripts.caches.table import memory_claims, speed_claims


def speed(state: int, peak: int, seconds: float) -> Speed:
    return Speed(step_seconds=seconds, state_bytes=state, peak_bytes=peak, weight_bytes=100, batch=10, dtype="float32")


def test_sequences_in_a_budget_count_the_peak_of_the_last_one():
    assert speed(20, 100, 1.0).sequences_in(1000) == 1 + 900 // 20
    assert speed(20, 100, 1.0).sequences_in(99) == 0
    assert speed(100, 100, 1.0).sequences_in(1000) == 10


@pytest.mark.heavy
def test_steps_are_timed_in_both_forms_where_there_are_two(monkeypatch):
    said: list[str] = []
    steps: list[int] = []
    compiled_call = CompiledDecode.__call__
    monkeypatch.setattr(CompiledDecode, "__call__", lambda *given: steps.append(1) or compiled_call(*given))
    policies = {"streaming": build_cache("streaming"), "think": build_cache("think")}
    sizes = SpeedSizes(context=128, batches=(2,), steps=1, turns=1, chunk=64)
    found = measure_speed(random_reader().model, policies, sizes, said.append)[2]
    assert len(steps) == 1 + sizes.steps + PROFILED
    assert [line for line in said if "turn 1 of 1, streaming, compiled: " in line]
    assert found["streaming"].step_seconds <= found["streaming"].operator_seconds
    assert found["think"].operator_seconds is None
    assert any("think is not compiled: layer 0" in line for line in said)


def test_speed_claims_are_computed():
    speeds = {"full": speed(100, 100, 4.0), "d2o": speed(20, 40, 1.0), "think": speed(75, 100, 4.5)}
    found = {claim.name: claim for claim in speed_claims("decode", speeds) + memory_claims(speeds)}
    ratio = found["decode: d2o, times the full cache's tokens/s"]
    assert (ratio.measured, ratio.holds) == (4.0, True)
    (share,) = (claim for name, claim in found.items() if "that its bytes allow" in name)
    assert share.measured == pytest.approx(4.0 / (1100 / 300), abs=1e-4)
    assert not found["decode: think, times the full cache's tokens/s"].holds
    assert found["think: share of the full cache's bytes that is gone"].measured == 0.25
    sequences = found["d2o: sequences in the memory of the full cache's, prefill peak counted"]
    assert sequences.measured == pytest.approx((1 + 960 // 20) / 10)


def test_parts_of_a_step_are_all_of_it():
    weight, keys, x = torch.randn(300, 300), torch.randn(8, 300, 300), torch.randn(300, 300)

    def run() -> None:
        for _ in range(3):
            torch.mm(x, weight)
            torch.bmm(keys, keys)
            keys.exp()

    begin = time.perf_counter()
    run()
    parts = step_parts(run, 3, seconds := (time.perf_counter() - begin) / 3)
    assert parts.weights + parts.entries + parts.rest == pytest.approx(seconds)
    assert min(parts.weights, parts.entries) > 0
    none = step_parts(lambda: None, 1, 2.0)
    assert (none.weights, none.entries, none.rest) == (0.0, 0.0, 2.0)


def test_a_slow_baseline_is_told():
    name = "decode: full cache's bytes/s over the best policy's"
    fair = {"full": speed(100, 100, 1.1), "d2o": speed(20, 40, 0.3)}
    slow = {"full": speed(100, 100, 11.0), "d2o": speed(20, 40, 0.3)}
    assert next(claim for claim in speed_claims("decode", fair) if claim.name == name).holds
    assert not next(claim for claim in speed_claims("decode", slow) if claim.name == name).holds


@pytest.fixture(scope="module")
def reader():
    return random_reader("mdha")


def test_the_roofline_by_hand():
    attention = OpCost(bytes_read=1500, bytes_written=100, flops=4800)
    cost = step_cost(weight_bytes=2000, weights=1000, attention=attention, batch=4)
    assert cost.nbytes == 2000 + 1600
    assert cost.flops == 4 * 2 * 1000 + 4800
    assert cost.seconds(CHIPS["H100"]) == pytest.approx(cost.nbytes / 3.35e12)


def test_a_full_cache_in_the_roofline_by_hand(reader):
    state = reader.model.init_state(1, 40)
    _, state = reader.model.extend(torch.arange(37)[None], state)
    cost = attention_cost(reader.model, state, 3)
    layers, entries = 2, 38  # the new token's is read too
    assert cost.bytes_read == layers * 3 * (entries * (2 * 2 * 16 * 4 + 8) + 4 * 16 * 4 + 8)
    assert cost.bytes_written == layers * 3 * 4 * 16 * 4
    assert cost.flops == layers * 3 * 2 * 4 * entries * 32


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("d2o", {"keep_ratio": 0.3, "min_tokens": 0}),
        ("think", {"channel_ratio": 0.5}),
        ("d2o+think", {"keep_ratio": 0.5, "min_tokens": 0, "channel_ratio": 0.5, "merge_counts": True}),
        ("streaming", {"keep_ratio": 0.3, "min_tokens": 0}),
    ],
)
def test_the_roofline_counts_what_operations_are_given(reader, policy, options, monkeypatch):
    """The costs of the operations themselves for what a decode step passes to them."""
    expected = []
    decode, merge = compressed.paged_decode, merging.evict_merge_step

    def watched_decode(q, prefix, tail, **rest):
        parts = [
            SegmentSizes(
                slots=part.slots,
                key_dim=part.keys_BKSC.shape[3],
                value_dim=part.values_BKSV.shape[3],
                position_heads=2 if part is prefix and policy != "think" else 1,
                merge_counts=part is prefix and part.log_counts_BKS is not None,
                channels=part.channels_BKC is not None,
                value_channels=part.value_channels_BKV is not None,
            )
            for part in (prefix, tail)
        ]
        probe = rest["probe_BKC"]
        sizes = {"batch": 3, "tokens": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "width": 4}
        sizes |= {
            "probe_dim": 0 if probe is None else probe.shape[2],
            "accumulated_attention": rest["accumulated_attention"],
        }
        expected.append(decode_cost(DecodeSizes(segments=tuple(parts), **sizes)))
        return decode(q, prefix, tail, **rest)

    def watched_merge(slots, **rest):
        dims = {"key_dim": slots.keys_BKPC.shape[3], "value_dim": slots.values_BKPV.shape[3], "width": 4}
        count, merge_counts = slots.keys_BKPC.shape[2], slots.merge_counts_BKP is not None
        if rest["rule"].kind != "drop":
            expected.append(merge_step_cost(batch=3, kv_heads=2, slots=count, merge_counts=merge_counts, **dims))
        return merge(slots, **rest)

    tokens = torch.randint(256, (1, 96))
    state = prefill(reader.model, tokens, build_cache(policy, options), chunk=96).state
    cost = attention_cost(reader.model, state, 3)
    monkeypatch.setattr(compressed, "paged_decode", watched_decode)
    monkeypatch.setattr(merging, "evict_merge_step", watched_merge)
    with torch.no_grad():
        reader.model.extend(tokens[:, :1], state)
    for name in ("bytes_read", "bytes_written", "flops"):
        assert getattr(cost, name) == sum(getattr(one, name) for one in expected)


def test_weight_bytes_count_a_tied_table_once(reader):
    assert weight_bytes(reader.model) == sum(p.nbytes for p in reader.model.parameters())
