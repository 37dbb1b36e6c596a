"""Inputs of compressed caches' kernels, and checks of them against the references in float64: on a CPU in Triton's
interpreter at tiny sizes, on a device at larger ones."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.accumulated_attention import Tables, accumulated_attention
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.evict_merge import Arrival, MergeRule, Slots, evict_merge, evict_merge_step
from attnzoo.ops.paged_decode import Decoded, Entries, paged_decode
from tests.helpers.conv_linear_kernels import assert_same, rand

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 2e-3}
"""Share of the largest entry. Inputs are exact in both; in low precision, weights and results are rounded."""


def moved(x: Any, device: str, dtype: torch.dtype) -> Any:
    """Tensors of a dataclass, or one tensor, on a device; floats in `dtype`, but log merge counts and what is no
    key."""
    if isinstance(x, Tensor):
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)
    if dataclasses.is_dataclass(x):
        kept = {"log_counts_BKS": torch.float32, "merge_counts_BKP": torch.float32}
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
        log_counts_BKS=rand(batch, kv_heads, slots, seed=seed + 5).abs() if rest.get("merge_counts") else None,
    )


DECODE_CASES: dict[str, tuple[tuple[int, ...], dict[str, bool]]] = {
    # B, K, G, T, slots of the prefix, of the tail, H, C, V
    "plain": ((2, 2, 1, 1, 37, 19, 5, 5, 5), {}),
    "thin keys": ((2, 2, 3, 1, 37, 19, 7, 4, 7), {"accumulated": True}),
    "thin keys and values, all options": (
        (2, 3, 3, 2, 35, 21, 7, 3, 5),
        {"accumulated": True, "merge_counts": True, "bias": True, "probe": True},
    ),
    "probe in another block of rows": ((1, 1, 8, 4, 35, 3, 5, 2, 5), {"probe": True, "accumulated": True}),
    "many queries": ((1, 2, 3, 13, 18, 15, 5, 3, 5), {"bias": True}),
    "no prefix": ((2, 2, 2, 1, 0, 33, 5, 5, 5), {"accumulated": True}),
    "no tail": ((1, 2, 2, 1, 33, 0, 5, 4, 5), {"probe": True}),
    "one slot": ((2, 1, 1, 1, 1, 1, 16, 16, 16), {"merge_counts": True}),
}


def decode_inputs(sizes: tuple[int, ...], options: dict[str, bool]) -> dict[str, Any]:
    B, K, G, T, P, S, H, C, V = sizes
    prefix = entries(B, K, P, H, C, V, 1, merge_counts=options.get("merge_counts"))
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
        "accumulated_attention": bool(options.get("accumulated")),
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
        log_counts_BKS=None if part.log_counts_BKS is None else filled(part.log_counts_BKS, 0.0),
    )
    return new, table


def check_pages(device: str, dtype: torch.dtype, sizes: tuple[int, ...], page: int, splits: tuple[int, int]) -> None:
    from attnzoo.ops.paged_decode.triton import Pages

    inputs = decode_inputs(sizes, {"accumulated": True, "merge_counts": True})
    pooled, tables = dict(inputs), {}
    for name in ("prefix", "tail"):
        pooled[name], tables[f"{name}_BI"] = paged(inputs[name], page, seed=3)
    inputs, pooled = ({name: moved(x, device, dtype) for name, x in given.items()} for given in (inputs, pooled))
    pages = Pages(**{name: table.to(device, torch.int32) for name, table in tables.items()})
    expected, actual = run_decode(inputs, splits), run_decode(pooled, splits, pages)
    assert_same({"out": actual.out_BNTH}, {"out": expected.out_BNTH}, TOLERANCE[dtype])
    kept, slots = sizes[4], sizes[5]
    first = tables["prefix_BI"].shape[1] * page
    assert actual.accumulated_BKS is not None
    assert expected.accumulated_BKS is not None
    accumulated = torch.cat(
        [actual.accumulated_BKS[..., :kept], actual.accumulated_BKS[..., first : first + slots]], dim=-1
    )
    assert_same({"accumulated": accumulated}, {"accumulated": expected.accumulated_BKS}, TOLERANCE[dtype])


MASS_CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    # B, K, G, T, S, H; T == S is the parallel form
    "parallel": ((2, 2, 2, 35, 35, 5), {}),
    "parallel, window and sinks": ((1, 2, 1, 37, 37, 5), {"window": 9, "sinks": 2}),
    "holes and counts": ((2, 2, 3, 19, 41, 5), {"counts": True}),
    "merge_counts": ((2, 1, 2, 1, 37, 6), {"merge_counts": True}),
    "tables": ((2, 2, 2, 21, 37, 5), {"relative": True, "merge_counts": True, "counts": True}),
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
        "mask": Mask(**mask),
        "counts_B": (T - torch.arange(B)).to(device) if options.get("counts") else None,
        "tables": Tables(*(moved(x, device, dtype) for x in tables)) if options.get("relative") else None,
        "log_counts_BKS": rand(B, K, S, seed=6).abs().float().to(device) if options.get("merge_counts") else None,
    }


def check_mass(
    sizes: tuple[int, ...], options: dict[str, Any], device: str, dtype: torch.dtype, block: int | None = None
) -> None:
    from attnzoo.ops.accumulated_attention.triton import accumulated_attention_triton

    given = mass_inputs(sizes, options, device, dtype)
    right = mass_inputs(sizes, options, "cpu", dtype)
    right = {name: x if name == "mask" else exact(x) for name, x in right.items()}
    if given["tables"] is not None:
        # q + u is rounded where the queries are of low precision
        right["tables"] = Tables(
            *(exact(getattr(given["tables"], f)) for f in ("content_bias_NH", "table_NPH", "table_bias_NP"))
        )
    q, k = right.pop("q_BNTH"), right.pop("k_BKSH")
    expected = accumulated_attention(q, k, impl="reference", **right)
    actual = accumulated_attention_triton(*given.values(), sizes[5] ** -0.5, None, block)
    assert_same({"accumulated": actual}, {"accumulated": expected}, TOLERANCE[dtype])


def flat(x: Any) -> list[Any]:
    return [leaf for inner in x for leaf in flat(inner)] if isinstance(x, tuple) else [x]


RULES = {
    "drop": MergeRule(kind="drop"),
    "paper": MergeRule(),
    "official": MergeRule(kind="official", beta=0.5),
    "together": MergeRule(together=True),
}


def merge_inputs(
    sizes: tuple[int, ...], rule: MergeRule, merge_counts: bool, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """The first kept key is also the last one, far from it, and the nearest of an evicted one; a kept and an evicted
    key are zeros; a threshold is known for the last sequence."""
    B, K, S, C, V = sizes
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randint(0, 3, (B, K, S), generator=generator)
    if rule.together:  # as many evicted a kv head, not the same ones
        turns = torch.rand(B, K, S, generator=generator).argsort(-1)
        kinds = kinds[:, :1].expand(-1, K, -1).gather(-1, turns)
    keep = kinds == 0
    keys = rand(B, K, S, C, seed=1)
    kept, gone = keep[0, 0].nonzero()[:, 0], (kinds[0, 0] == 1).nonzero()[:, 0]
    keys[0, :, kept[-1]] = keys[0, :, kept[0]]
    keys[0, :, gone[1]] = 2 * keys[0, :, kept[0]]
    keys[0, :, kept[1]] = 0
    keys[0, :, gone[0]] = 0
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
        "merge_counts_BKS": (rand(B, K, S, seed=3).abs() + 1).float().to(device) if merge_counts else None,
    }


def check_merge(
    sizes: tuple[int, ...],
    rule: MergeRule,
    merge_counts: bool,
    device: str,
    dtype: torch.dtype,
    block: int | None = None,
) -> None:
    from attnzoo.ops.evict_merge.triton import evict_merge_triton

    given = merge_inputs(sizes, rule, merge_counts, device, dtype)
    right = {name: exact(x) if name != "rule" else x for name, x in given.items()}
    keys, values = right.pop("keys_BKSC"), right.pop("values_BKSV")
    expected = evict_merge(keys, values, impl="reference", **right)
    actual = evict_merge_triton(*given.values(), block)
    assert torch.equal(actual.source_BKM.cpu(), expected.source_BKM)
    again = actual if device == "cpu" else evict_merge_triton(*given.values(), block)  # programs run one by one there
    for name in ("keys_BKMC", "values_BKMV", "merge_counts_BKM", "threshold_BK"):
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert (found is None) == (wanted is None), name
        if found is not None:
            assert torch.equal(found.nan_to_num(-7), getattr(again, name).nan_to_num(-7)), f"{name}: not repeatable"
            assert torch.equal(found.isnan().cpu(), wanted.isnan()), name
            assert_same({name: found.nan_to_num(0)}, {name: wanted.nan_to_num(0)}, TOLERANCE[dtype])


def step_inputs(
    sizes: tuple[int, ...], rule: MergeRule, merge_counts: bool, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Some slots are empty, some heads have no victim, one victim is a key of zeros, the last arrival goes nowhere."""
    B, K, P, C, V = sizes
    generator = torch.Generator().manual_seed(5)
    keys = rand(B, K, P, C, seed=1).to(dtype)
    victims = torch.randint(0, P, (B, K), generator=generator)
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
        merge_counts_BKP=rand(B, K, P, seed=3).abs() + 1 if merge_counts else None,
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


def check_step(sizes: tuple[int, ...], rule: MergeRule, merge_counts: bool, device: str, dtype: torch.dtype) -> None:
    given = step_inputs(sizes, rule, merge_counts, device, dtype)
    right = {
        name: x if name == "rule" else exact(x)
        for name, x in step_inputs(sizes, rule, merge_counts, device, dtype).items()
    }
    results = []
    for values, impl in ((given, "triton"), (right, "reference")):
        state = values.pop("slots")
        after = evict_merge_step(state, impl=impl, **values)
        results.append(named(state) | {"known": (~after.isnan()).float(), "threshold": after.nan_to_num(0)})
    assert_same(*results, TOLERANCE[dtype])
