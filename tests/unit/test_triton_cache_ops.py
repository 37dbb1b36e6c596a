"""The kernels of compressed caches in Triton's interpreter, against the references in float64.

tests/gpu/test_cache_ops_gpu.py runs the same checks, `check_*`, at larger sizes on a device.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.ops.evict_merge import Arrival, MergeRule, Slots, evict_merge, evict_merge_step
from attnzoo.ops.key_mass import Tables, key_mass
from attnzoo.ops.masks import CausalMask
from attnzoo.ops.paged_decode import Decoded, Entries, paged_decode
from attnzoo.ops.paged_decode.splits import Splits, plan_splits
from tests.unit.test_triton_conv_linear import assert_same, interpreted, rand

pytest.importorskip("triton", reason="the package triton is not installed")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}
"""Share of the largest entry. Inputs are exact in both; in low precision, weights and results are rounded."""


def moved(x: Any, device: str, dtype: torch.dtype) -> Any:
    """Tensors of a dataclass, or one tensor, on a device; floats in `dtype`, but log votes and what is no key."""
    if isinstance(x, Tensor):
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)
    if dataclasses.is_dataclass(x):
        kept = {"log_votes_BKS": torch.float32, "votes_BKP": torch.float32}
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return type(x)(**{name: moved(value, device, kept.get(name, dtype)) for name, value in fields.items()})
    return x


def exact(x: Any) -> Any:
    """The same numbers in float64 on the CPU."""
    return moved(x, "cpu", torch.float64)


def holes(batch: int, heads: int, slots: int, latest: int, seed: int) -> Tensor:
    """Positions in no order, a fifth of them empty, some in the future of all queries."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, latest + 4, (batch, heads, slots), generator=generator)
    positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    return positions


def channels(batch: int, kv_heads: int, head_dim: int, width: int, seed: int) -> Tensor | None:
    """Channels of each kv head in no order; None for all."""
    if width == head_dim:
        return None
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(head_dim, generator=generator)[:width] for _ in range(batch * kv_heads)]
    return torch.stack(picks).view(batch, kv_heads, width)


def entries(
    batch: int, kv_heads: int, slots: int, head_dim: int, key: int, value: int, seed: int, **rest: Any
) -> Entries:
    return Entries(
        keys_BKSC=rand(batch, kv_heads, slots, key, seed=seed),
        values_BKSV=rand(batch, kv_heads, slots, value, seed=seed + 1),
        positions_BKS=holes(batch, rest.get("heads", kv_heads), slots, 50, seed + 2),
        channels_BKC=channels(batch, kv_heads, head_dim, key, seed + 3),
        value_channels_BKV=channels(batch, kv_heads, head_dim, value, seed + 4),
        log_votes_BKS=rand(batch, kv_heads, slots, seed=seed + 5).abs() if rest.get("votes") else None,
    )


DECODE_CASES: dict[str, tuple[tuple[int, ...], dict[str, bool]]] = {
    # B, K, G, T, slots of the prefix, of the tail, H, C, V
    "plain": ((2, 2, 1, 1, 37, 19, 5, 5, 5), {}),
    "thin keys": ((2, 2, 3, 1, 37, 19, 7, 4, 7), {"mass": True}),
    "thin keys and values, all options": (
        (2, 3, 3, 2, 35, 21, 7, 3, 5),
        {"mass": True, "votes": True, "bias": True, "probe": True},
    ),
    "probe in another block of rows": ((1, 1, 8, 4, 35, 3, 5, 2, 5), {"probe": True, "mass": True}),
    "many queries": ((1, 2, 3, 13, 18, 15, 5, 3, 5), {"bias": True}),
    "no prefix": ((2, 2, 2, 1, 0, 33, 5, 5, 5), {"mass": True}),
    "no tail": ((1, 2, 2, 1, 33, 0, 5, 4, 5), {"probe": True}),
    "one slot": ((2, 1, 1, 1, 1, 1, 16, 16, 16), {"votes": True}),
}


def decode_inputs(sizes: tuple[int, ...], options: dict[str, bool]) -> dict[str, Any]:
    B, K, G, T, P, S, H, C, V = sizes
    prefix = entries(B, K, P, H, C, V, 1, votes=options.get("votes"))
    tail = entries(B, K, S, H, H, H, 11, heads=1)
    for part in (prefix, tail):
        part.positions_BKS[:, :, :1] = 0  # every query sees something
    return {
        "q_BNTH": rand(B, K * G, T, H, seed=21),
        "prefix": prefix if P else None,
        "tail": tail,
        "query_positions_BT": 40 + torch.arange(T).expand(B, T) - 13 * torch.arange(B)[:, None],
        "bias_BNTS": rand(B, K * G, T, P + S, seed=22) if options.get("bias") else None,
        "probe_BKC": rand(B, K, C, seed=23) if options.get("probe") else None,
        "key_mass": bool(options.get("mass")),
    }


def run_decode(inputs: dict[str, Any], splits: tuple[int, int] | None = None, pages: Any = None) -> Decoded:
    from attnzoo.ops.paged_decode.triton import paged_decode_triton

    return paged_decode_triton(*inputs.values(), pages, splits)


def named(decoded: Decoded) -> dict[str, Tensor]:
    fields = {f.name: getattr(decoded, f.name) for f in dataclasses.fields(decoded)}
    return {name: x for name, x in fields.items() if x is not None}


def check_decode(
    sizes: tuple[int, ...], options: dict[str, bool], device: str, dtype: torch.dtype, splits: tuple[int, int] | None
) -> None:
    given = {name: moved(x, device, dtype) for name, x in decode_inputs(sizes, options).items()}
    right = {name: exact(x) for name, x in given.items()}
    q, prefix, tail = (right.pop(name) for name in ("q_BNTH", "prefix", "tail"))
    expected = paged_decode(q, prefix, tail, impl="reference", **right)
    assert_same(named(run_decode(given, splits)), named(expected), TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECODE_CASES)
def test_paged_decode(name, dtype):
    check_decode(*DECODE_CASES[name], "cpu", dtype, (16, 1))


@interpreted
@pytest.mark.parametrize("splits", [None, (16, 2), (32, 1)])
def test_how_the_context_is_split_changes_nothing(splits):
    check_decode(*DECODE_CASES["thin keys and values, all options"], "cpu", torch.float32, splits)


@interpreted
def test_chosen_by_impl():
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["thin keys"]).items()}
    q, prefix, tail = (inputs.pop(name) for name in ("q_BNTH", "prefix", "tail"))
    decoded = [paged_decode(q, prefix, tail, impl=impl, **inputs) for impl in ("triton", "torch")]
    assert_same(*map(named, decoded), 1e-5)


@interpreted
def test_views_of_buffers_and_what_empty_slots_hold():
    """Keys and values are views of larger buffers, and no number of an empty or later slot is read."""
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["thin keys"]).items()}
    expected = run_decode(inputs, (16, 1))
    for name in ("prefix", "tail"):
        part, hidden = inputs[name], {}
        unseen = ((part.positions_BKS < 0) | (part.positions_BKS > 40))[..., None]
        for what in ("keys_BKSC", "values_BKSV"):
            x = getattr(part, what)
            buffer = torch.full((x.shape[0], x.shape[1], x.shape[2] + 7, x.shape[3] + 3), math.nan)
            buffer[:, :, : x.shape[2], : x.shape[3]] = x.masked_fill(unseen, math.nan)
            hidden[what] = buffer[:, :, : x.shape[2], : x.shape[3]]
        inputs[name] = dataclasses.replace(part, **hidden)
    assert_same(named(run_decode(inputs, (16, 1))), named(expected), 0.0)


def paged(part: Entries, page: int, seed: int) -> tuple[Entries, Tensor]:
    """The entries in pages of a pool, in random places with unused ones between them, and the table."""
    batch, kv_heads, slots, _ = part.keys_BKSC.shape
    count = -(-slots // page)
    table = torch.randperm(2 * batch * count, generator=torch.Generator().manual_seed(seed))[: batch * count]
    table = table.view(batch, count)

    def pool(x_BKSC: Tensor) -> Tensor:
        out = x_BKSC.new_full((2 * batch * count, kv_heads, page, x_BKSC.shape[3]), math.nan)
        wide = torch.nn.functional.pad(x_BKSC, (0, 0, 0, count * page - slots))
        out[table] = wide.unflatten(2, (count, page)).transpose(1, 2)
        return out

    def filled(x_BKS: Tensor, other: float) -> Tensor:
        return torch.nn.functional.pad(x_BKS, (0, count * page - slots), value=other)

    new = dataclasses.replace(
        part,
        keys_BKSC=pool(part.keys_BKSC),
        values_BKSV=pool(part.values_BKSV),
        positions_BKS=filled(part.positions_BKS, -1),
        log_votes_BKS=None if part.log_votes_BKS is None else filled(part.log_votes_BKS, 0.0),
    )
    return new, table


def check_pages(device: str, dtype: torch.dtype, sizes: tuple[int, ...], page: int, splits: tuple[int, int]) -> None:
    from attnzoo.ops.paged_decode.triton import Pages

    inputs = decode_inputs(sizes, {"mass": True, "votes": True})
    pooled, tables = dict(inputs), {}
    for name in ("prefix", "tail"):
        pooled[name], tables[f"{name}_BI"] = paged(inputs[name], page, seed=3)
    inputs, pooled = ({name: moved(x, device, dtype) for name, x in given.items()} for given in (inputs, pooled))
    pages = Pages(**{name: table.to(device, torch.int32) for name, table in tables.items()})
    expected, actual = run_decode(inputs, splits), run_decode(pooled, splits, pages)
    assert_same({"out": actual.out_BNTH}, {"out": expected.out_BNTH}, TOLERANCE[dtype])
    kept, slots = sizes[4], sizes[5]
    first = tables["prefix_BI"].shape[1] * page
    assert actual.mass_BKS is not None
    assert expected.mass_BKS is not None
    mass = torch.cat([actual.mass_BKS[..., :kept], actual.mass_BKS[..., first : first + slots]], dim=-1)
    assert_same({"mass": mass}, {"mass": expected.mass_BKS}, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("page", [16, 5])
def test_pages_are_contiguous_rows(page):
    check_pages("cpu", torch.float32, (2, 2, 2, 1, 37, 19, 5, 3, 5), page, (16, 1))


@interpreted
def test_query_that_sees_nothing_gets_zeros():
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["plain"]).items()}
    inputs["query_positions_BT"] = torch.tensor([[-1], [40]])
    out = run_decode(inputs, (16, 1)).out_BNTH
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (out[1] != 0).all()


def test_splits_share_out_blocks():
    assert plan_splits(100, 28, rows=3, multiprocessors=132) == Splits(blocks=2, prefix=50, tail=14)
    assert plan_splits(100, 28, rows=132 * 4, multiprocessors=132) == Splits(blocks=128, prefix=1, tail=1)
    assert plan_splits(0, 1, rows=1, multiprocessors=1) == Splits(blocks=2, prefix=0, tail=1)
    for prefix, tail, rows in ((7, 3, 5), (1000, 1, 17), (0, 129, 3)):
        plan = plan_splits(prefix, tail, rows=rows, multiprocessors=10)
        assert plan.prefix * plan.blocks >= prefix > (plan.prefix - 1) * plan.blocks
        assert plan.tail * plan.blocks >= tail > (plan.tail - 1) * plan.blocks
        assert plan.total * rows <= 10 * 4 + 2 * rows


MASS_CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    # B, K, G, T, S, H; T == S is the parallel form
    "parallel": ((2, 2, 2, 35, 35, 5), {}),
    "parallel, window and sinks": ((1, 2, 1, 37, 37, 5), {"window": 9, "sinks": 2}),
    "holes and counts": ((2, 2, 3, 19, 41, 5), {"counts": True}),
    "votes": ((2, 1, 2, 1, 37, 6), {"votes": True}),
    "tables": ((2, 2, 2, 21, 37, 5), {"relative": True, "votes": True, "counts": True}),
    "tables of the parallel form": ((1, 1, 2, 35, 35, 5), {"relative": True, "window": 20}),
}


def mass_inputs(sizes: tuple[int, ...], options: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    B, K, G, T, S, H = sizes
    mask = {name: options[name] for name in ("window", "sinks") if name in options}
    if T != S:
        queries_BT = 60 - T + torch.arange(T).expand(B, T) - 5 * torch.arange(B)[:, None]
        keys_BKS = holes(B, K, S, 60, 3)
        keys_BKS[:, :, 0] = 0
        mask |= {"query_positions_BT": queries_BT.to(device), "key_positions_BKS": keys_BKS.to(device)}
    tables = (rand(K * G, H, seed=1), rand(K * G, 9, H, seed=2), rand(K * G, 9, seed=3))
    return {
        "q_BNTH": moved(rand(B, K * G, T, H, seed=4), device, dtype),
        "k_BKSH": moved(rand(B, K, S, H, seed=5), device, dtype),
        "mask": CausalMask(**mask),
        "counts_B": (T - torch.arange(B)).to(device) if options.get("counts") else None,
        "tables": Tables(*(moved(x, device, dtype) for x in tables)) if options.get("relative") else None,
        "log_votes_BKS": rand(B, K, S, seed=6).abs().float().to(device) if options.get("votes") else None,
    }


def check_mass(
    sizes: tuple[int, ...], options: dict[str, Any], device: str, dtype: torch.dtype, block: int | None = None
) -> None:
    from attnzoo.ops.key_mass.triton import key_mass_triton

    given = mass_inputs(sizes, options, device, dtype)
    right = mass_inputs(sizes, options, "cpu", dtype)
    right = {name: x if name == "mask" else exact(x) for name, x in right.items()}
    if given["tables"] is not None:
        # q + u is rounded where the queries are of low precision
        right["tables"] = Tables(
            *(exact(getattr(given["tables"], f)) for f in ("content_bias_NH", "table_NPH", "table_bias_NP"))
        )
    q, k = right.pop("q_BNTH"), right.pop("k_BKSH")
    expected = key_mass(q, k, impl="reference", **right)
    actual = key_mass_triton(*given.values(), sizes[5] ** -0.5, None, block)
    assert_same({"mass": actual}, {"mass": expected}, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASS_CASES)
def test_key_mass(name, dtype):
    check_mass(*MASS_CASES[name], "cpu", dtype, 16)


@interpreted
def test_key_mass_chosen_by_impl():
    given = mass_inputs(*MASS_CASES["holes and counts"], "cpu", torch.float32)
    q, k = given.pop("q_BNTH"), given.pop("k_BKSH")
    masses = [{"mass": key_mass(q, k, impl=impl, **given)} for impl in ("triton", "torch")]
    assert_same(*masses, 1e-5)


@interpreted
def test_key_mass_by_parts_of_the_queries(monkeypatch):
    """Where tables ask for logits by distance, only so many queries as LOGITS_BYTES allow are dealt with at once."""
    from attnzoo.ops.key_mass import triton as kernels

    monkeypatch.setattr(kernels, "LOGITS_BYTES", 1)
    check_mass(*MASS_CASES["tables"], "cpu", torch.float32, 16)


@interpreted
def test_key_mass_with_known_sums_of_rows():
    """What the forward pass of attention left, log2 of each row's sum, saves the first pass and changes nothing."""
    from attnzoo.ops.key_mass.triton import key_mass_triton

    given = mass_inputs(*MASS_CASES["parallel"], "cpu", torch.float32)
    q, k = given["q_BNTH"], given["k_BKSH"]
    scores = (q.unflatten(1, (2, -1)) @ k[:, :, None].mT).flatten(1, 2) * 5**-0.5
    scores = scores.masked_fill(torch.ones(35, 35).triu(1).bool(), -math.inf)
    sums = scores.logsumexp(-1) / math.log(2)
    masses = [{"mass": key_mass_triton(*given.values(), 5**-0.5, x, 16)} for x in (sums, None)]
    assert_same(*masses, 1e-5)
    assert (key_mass_triton(*given.values(), 5**-0.5, sums + 1, 16) / masses[0]["mass"] - 0.5).abs().max() < 1e-5


def test_key_mass_is_never_tokens_by_tokens():
    """What the kernels are given, inputs and scratch alike, grows with T, not with T x T."""
    from attnzoo.ops.key_mass.triton import launches

    def numbers(tokens: int) -> int:
        q, k = (torch.empty(1, n, tokens, 64, dtype=torch.bfloat16, device="meta") for n in (4, 2))
        mass = torch.empty(1, 2, tokens, device="meta")
        done = launches(q, k, CausalMask(), None, None, None, 0.125, mass_BKS=mass, gpu="sm_90")
        arguments = [x for launch in done for argument in launch.arguments.values() for x in flat(argument)]
        return max(x.numel() for x in arguments if isinstance(x, Tensor))

    assert numbers(65536) == 2 * numbers(32768) == 4 * 65536 * 64


def flat(x: Any) -> list[Any]:
    return [leaf for inner in x for leaf in flat(inner)] if isinstance(x, tuple) else [x]


RULES = {
    "drop": MergeRule(kind="drop"),
    "paper": MergeRule(),
    "official": MergeRule(kind="official", beta=0.5),
    "together": MergeRule(together=True),
}


def merge_inputs(
    sizes: tuple[int, ...], rule: MergeRule, votes: bool, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """One kept key twice, one kept key of zeros, one evicted key of zeros; a threshold known for the last sequence."""
    B, K, S, C, V = sizes
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(0, 3, (B, 1 if rule.together else K, S), generator=generator).expand(B, K, S)
    keep = kinds == 0
    keys = rand(B, K, S, C, seed=1)
    first, second, third = (keep[0, 0].nonzero()[i, 0] for i in (0, 1, 2))
    keys[0, :, second] = keys[0, :, first]
    keys[0, :, third] = 0
    keys[0, :, (kinds[0, 0] == 1).nonzero()[0, 0]] = 0
    threshold = torch.full((B, K), math.nan)
    threshold[-1] = 0.2
    return {
        "keys_BKSC": keys.to(device, dtype),
        "values_BKSV": rand(B, K, S, V, seed=2).to(device, dtype),
        "keep_BKS": keep.to(device),
        "evict_BKS": (kinds == 1).to(device),
        "slots": int(keep.sum(-1).max()) + 2,
        "rule": rule,
        "threshold_BK": threshold.to(device),
        "votes_BKS": (rand(B, K, S, seed=3).abs() + 1).float().to(device) if votes else None,
    }


def check_merge(
    sizes: tuple[int, ...], rule: MergeRule, votes: bool, device: str, dtype: torch.dtype, block: int | None = None
) -> None:
    from attnzoo.ops.evict_merge.triton import evict_merge_triton

    given = merge_inputs(sizes, rule, votes, device, dtype)
    right = {name: exact(x) if name != "rule" else x for name, x in given.items()}
    keys, values = right.pop("keys_BKSC"), right.pop("values_BKSV")
    expected = evict_merge(keys, values, impl="reference", **right)
    actual = evict_merge_triton(*given.values(), block)
    assert torch.equal(actual.source_BKM.cpu(), expected.source_BKM)
    again = evict_merge_triton(*given.values(), block)
    for name in ("keys_BKMC", "values_BKMV", "votes_BKM", "threshold_BK"):
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert (found is None) == (wanted is None), name
        if found is not None:
            assert torch.equal(found.nan_to_num(-7), getattr(again, name).nan_to_num(-7)), f"{name}: not repeatable"
            assert torch.equal(found.isnan().cpu(), wanted.isnan()), name
            assert_same({name: found.nan_to_num(0)}, {name: wanted.nan_to_num(0)}, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("votes", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_evict_merge(rule, votes, dtype):
    check_merge((2, 3, 41, 5, 3), RULES[rule], votes, "cpu", dtype, 16)


@interpreted
def test_nothing_evicted_is_copied():
    given = merge_inputs((2, 2, 11, 5, 3), MergeRule(), True, "cpu", torch.float32)
    given["evict_BKS"] = torch.zeros_like(given["evict_BKS"])
    keys, values = given.pop("keys_BKSC"), given.pop("values_BKSV")
    merged = evict_merge(keys, values, impl="triton", **given)
    index = merged.source_BKM.clamp(min=0)[..., None]
    held = (merged.source_BKM >= 0)[..., None]
    assert torch.equal(merged.keys_BKMC, keys.gather(2, index.expand(-1, -1, -1, 5)) * held)
    assert torch.equal(merged.threshold_BK.isnan(), given["threshold_BK"].isnan())


def step_inputs(
    sizes: tuple[int, ...], rule: MergeRule, votes: bool, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Some slots are empty, some heads have no victim, one victim is a key of zeros, the last arrival goes nowhere."""
    B, K, P, C, V = sizes
    generator = torch.Generator().manual_seed(5)
    keys = rand(B, K, P, C, seed=1).to(dtype)
    victims = torch.randint(0, P, (B, 1 if rule.together else K), generator=generator).expand(B, K).clone()
    keys[0, :, victims[0, 0]] = 0
    victims[1] = -1
    norms = keys.double().norm(dim=-1) * (torch.rand(B, K, P, generator=generator) > 0.2)
    place = victims.clamp(min=0)[..., None]
    norms.scatter_(-1, place, keys.double().norm(dim=-1).gather(-1, place))
    index = place[..., None].expand(-1, -1, 1, C)
    dots = (keys.double().gather(2, index) @ keys.double().mT)[:, :, 0]
    slot = victims.clone()
    slot[1] = torch.arange(K) % P
    slot[2, -1] = -1
    threshold = rand(B, K, seed=4) * 0.3
    threshold[0] = math.nan
    state = Slots(
        keys_BKPC=keys,
        values_BKPV=rand(B, K, P, V, seed=2),
        norms_BKP=norms,
        votes_BKP=rand(B, K, P, seed=3).abs() + 1 if votes else None,
    )
    arrival = Arrival(key_BKC=rand(B, K, C, seed=6), value_BKV=rand(B, K, V, seed=7), slot_BK=slot)
    return {
        "slots": moved(state, device, dtype),
        "victim_BK": victims.to(device),
        "dots_BKP": dots.float().to(device),
        "arrival": moved(arrival, device, dtype),
        "rule": rule,
        "threshold_BK": threshold.float().to(device),
    }


def check_step(sizes: tuple[int, ...], rule: MergeRule, votes: bool, device: str, dtype: torch.dtype) -> None:
    given = step_inputs(sizes, rule, votes, device, dtype)
    right = {
        name: x if name == "rule" else exact(x) for name, x in step_inputs(sizes, rule, votes, device, dtype).items()
    }
    results = []
    for values, impl in ((given, "triton"), (right, "reference")):
        state = values.pop("slots")
        after = evict_merge_step(state, impl=impl, **values)
        results.append(named(state) | {"valid": ~after.isnan(), "threshold": after.nan_to_num(0)})
    assert_same(*results, TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("votes", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_evict_merge_step(rule, votes, dtype):
    check_step((4, 3, 21, 5, 3), RULES[rule], votes, "cpu", dtype)


@interpreted
def test_a_victim_is_compared_with_all_slots(monkeypatch):
    from attnzoo.ops.evict_merge import triton as kernels

    monkeypatch.setattr(kernels, "MATCHED", 16)
    check_step((4, 2, 53, 5, 3), MergeRule(), True, "cpu", torch.float32)


@interpreted
def test_what_the_kernels_cannot_do_is_refused():
    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["plain"]).items()}
    with pytest.raises(ValueError, match=r"float64.*use impl='torch'"):
        run_decode(inputs | {"q_BNTH": inputs["q_BNTH"].double()})
    with pytest.raises(ValueError, match="no gradients"):
        run_decode(inputs | {"q_BNTH": inputs["q_BNTH"].clone().requires_grad_()})
    wide = {
        name: moved(x, "cpu", torch.float32) for name, x in decode_inputs((1, 1, 1, 1, 1, 1, 257, 257, 257), {}).items()
    }
    with pytest.raises(ValueError, match="1 to 256 channels, and queries has 257"):
        run_decode(wide)
    given = mass_inputs(*MASS_CASES["parallel"], "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"float64.*use impl='torch'"):
        key_mass(given["q_BNTH"].double(), given["k_BKSH"], impl="triton")
    merge = merge_inputs((2, 2, 11, 5, 3), MergeRule(), False, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"values torch.float64.*use impl='torch'"):
        evict_merge(merge.pop("keys_BKSC"), merge.pop("values_BKSV").double(), impl="triton", **merge)
    step = step_inputs((4, 2, 7, 5, 3), MergeRule(), False, "cpu", torch.float32)
    state = step.pop("slots")
    strided = state.keys_BKPC.repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match="their last axis must be dense"):
        evict_merge_step(dataclasses.replace(state, keys_BKPC=strided), impl="triton", **step)


@interpreted
def test_page_tables_that_do_not_fit_are_refused():
    from attnzoo.ops.paged_decode.triton import Pages

    inputs = {name: moved(x, "cpu", torch.float32) for name, x in decode_inputs(*DECODE_CASES["plain"]).items()}
    with pytest.raises(ValueError, match=r"pages.tail_BI \(3, 1\) must be \[2, pages of a sequence\]"):
        run_decode(inputs, pages=Pages(tail_BI=torch.zeros(3, 1, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"tail: positions .* must be \[2, K or 1, 38\] for 2 pages of 19 slots"):
        run_decode(inputs, pages=Pages(tail_BI=torch.zeros(2, 2, dtype=torch.int32)))
