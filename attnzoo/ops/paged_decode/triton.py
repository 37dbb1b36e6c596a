"""Decode attention over a compressed cache on a GPU, its context split over programs (Flash-Decoding).

Two launches, and a third for the accumulated attention of keys: partial results of ranges of slots, their combination,
and weights from the scores that the first one stored (4 bytes per query head and slot; reading the keys again would
take H elements). Without atomics: runs agree bit for bit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.ops.common.launch import Launch, check_inputs
from attnzoo.ops.paged_decode.entries import Decoded, Entries
from attnzoo.ops.paged_decode.launch import Call, Layout, Pages
from attnzoo.ops.relative_sdpa.tilings import ARCHITECTURES

WIDEST_HEAD = 256


def paged_decode_triton(
    q_BNTH: Tensor,
    prefix: Entries | None,
    tail: Entries,
    query_positions_BT: Tensor,
    bias_BNTS: Tensor | None,
    probe_BKC: Tensor | None,
    accumulated_attention: bool,
    pages: Pages | None = None,
    splits: tuple[int, int] | None = None,
) -> Decoded:
    """As `paged_decode`, with entries in contiguous rows or in `pages` of a pool.

    `splits`: (slots of a block, a power of two and at least 16; blocks of a program), instead of those chosen by the
    sizes: tests on tiny shapes use it. A query that sees no entry gets zeros. Raises ValueError for what the kernels
    cannot do: other dtypes, heads wider than 256, gradients, tables that do not fit.
    """
    segments = [] if prefix is None else [("prefix", prefix)]
    named = {
        f"{name} {what}": x
        for name, part in [*segments, ("tail", tail)]
        for what, x in (("keys", part.keys_BKSC), ("values", part.values_BKSV))
    }
    check_inputs("paged_decode", WIDEST_HEAD, queries=q_BNTH, probe=probe_BKC, **named)
    if tail.channels_BKC is not None or tail.value_channels_BKV is not None:
        raise ValueError("paged_decode with impl='triton' takes tails with all channels; use impl='torch'")
    with torch.no_grad():
        plan = Layout(pages=pages or Pages(), splits=splits)
        call = Call.of(q_BNTH, prefix, tail, query_positions_BT, bias_BNTS, probe_BKC, accumulated_attention, plan)
        for launch in call.launches():
            launch()
    return Decoded(
        out_BNTH=call.out_BTNH.transpose(1, 2), accumulated_BKS=call.accumulated_BKS, dots_BKP=call.partial.dots
    )


def aot_cases() -> list[Launch]:
    """Every launch of a step, with all options and with none, on meta tensors."""
    cases: list[Launch] = []
    for gpu in ARCHITECTURES:
        for dtype, head_dim, width in (
            (torch.bfloat16, 64, 32),
            (torch.bfloat16, 64, 64),
            (torch.bfloat16, 128, 64),
            (torch.float32, 64, 32),
            (torch.float32, 128, 128),
            (torch.bfloat16, 256, 256),
            (torch.float32, 256, 256),
        ):
            cases += _case(dtype, head_dim, width, 1, gpu)
        cases += _case(torch.bfloat16, 64, 32, 9, gpu)  # more rows than one program takes
        cases += _case(torch.bfloat16, 128, 64, 9, gpu)
    return cases


def _case(dtype: torch.dtype, head_dim: int, width: int, tokens: int, gpu: str) -> Iterator[Launch]:
    """The launches of one size: pruned keys come with all options and pages, whole keys with none."""

    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    batch, kv_heads, heads, slots = 2, 3, 9, 992
    thin = width < head_dim
    index = torch.int64
    prefix = Entries(
        keys_BKSC=meta(batch, kv_heads, slots, width),
        values_BKSV=meta(batch, kv_heads, slots, width),
        positions_BKS=meta(batch, kv_heads, slots, kind=index),
        channels_BKC=meta(batch, kv_heads, width, kind=index) if thin else None,
        value_channels_BKV=meta(batch, kv_heads, width, kind=index) if thin else None,
        log_counts_BKS=meta(batch, kv_heads, slots, kind=torch.float32) if thin else None,
    )
    tail = Entries(
        keys_BKSC=meta(9, kv_heads, 16, head_dim) if thin else meta(batch, kv_heads, slots, head_dim),
        values_BKSV=meta(9, kv_heads, 16, head_dim) if thin else meta(batch, kv_heads, slots, head_dim),
        positions_BKS=meta(batch, 1, 64 if thin else slots, kind=index),
    )
    yield from Call.of(
        meta(batch, heads, tokens, head_dim),
        prefix,
        tail,
        meta(batch, tokens, kind=index),
        meta(batch, heads, tokens, slots + 64) if thin else None,
        meta(batch, kv_heads, width) if thin else None,
        thin,
        Layout(pages=Pages(tail_BI=meta(batch, 4, kind=torch.int32) if thin else None), gpu=gpu),
    ).launches()


__all__ = ["Pages", "aot_cases", "paged_decode_triton"]
