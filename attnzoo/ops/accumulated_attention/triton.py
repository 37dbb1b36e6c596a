"""Column sums of attention on a GPU: tiles of scores twice, first for the sums of rows, then for those of columns.

With the rows' sums given (a flash-style forward pass has them) the first pass is left out. Memory beyond the result is
one number a query, and with tables the logits by distance of as many queries as fit LOGITS_BYTES.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.ops.accumulated_attention.launch import Buffers, launches
from attnzoo.ops.common.launch import Launch, check_inputs
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.tables import Tables
from attnzoo.ops.relative_sdpa.tilings import ARCHITECTURES

WIDEST_HEAD = 256


def accumulated_attention_triton(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    mask: Mask,
    counts_B: Tensor | None,
    tables: Tables | None,
    log_counts_BKS: Tensor | None,
    scale: float,
    log_sums_BNT: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """accumulated_BKS in float32.

    log_sums_BNT: log2 of each row's sum of exponentials, where it is known. `block` replaces the chosen tile size (a
    power of two, at least 16): tests on tiny shapes use it. Raises ValueError for what the kernels cannot do: other
    dtypes, heads wider than 256, gradients.
    """
    check_inputs("accumulated_attention", WIDEST_HEAD, queries=q_BNTH, keys=k_BKSH)
    accumulated_BKS = torch.zeros(k_BKSH.shape[:3], dtype=torch.float32, device=k_BKSH.device)
    if accumulated_BKS.numel() == 0 or q_BNTH.numel() == 0:
        return accumulated_BKS
    with torch.no_grad():
        whole = None if tables is None else tables.whole(q_BNTH.shape[-1])
        given = (q_BNTH, k_BKSH, mask, counts_B, whole, log_counts_BKS, scale)
        for launch in launches(
            *given, Buffers(accumulated_BKS=accumulated_BKS, log_sums_BNT=log_sums_BNT, block=block)
        ):
            launch()
    return accumulated_BKS


def aot_cases() -> list[Launch]:
    """Prefill without tables, and with all that it may carry, on meta tensors."""
    cases: list[Launch] = []
    for gpu in ARCHITECTURES:
        for dtype, head_dim, forms in (
            (torch.bfloat16, 64, (False, True)),
            (torch.bfloat16, 128, (False, True)),
            (torch.bfloat16, 256, (True,)),
            (torch.float32, 64, (False, True)),
            (torch.float32, 128, (False,)),
            (torch.float32, 256, (True,)),
        ):
            for relative in forms:
                cases += _case(dtype, head_dim, gpu, 1000, relative=relative)
    return [*cases, *(case for gpu in ARCHITECTURES for case in _case(torch.bfloat16, 16, gpu, 1, relative=True))]


def _case(dtype: torch.dtype, head_dim: int, gpu: str, tokens: int, *, relative: bool) -> Iterator[Launch]:
    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    batch, heads, kv_heads, slots = 2, 9, 3, 1500
    places = (meta(batch, tokens, kind=torch.int64), meta(batch, kv_heads, slots, kind=torch.int64))
    window, sinks = (128, 4) if relative else (None, 0)
    tables = Tables(meta(heads, head_dim), meta(heads, 300, head_dim), meta(heads, 300)) if relative else None
    yield from launches(
        meta(batch, heads, tokens, head_dim),
        meta(batch, kv_heads, slots, head_dim),
        Mask(query_positions_BT=places[0], key_positions_BKS=places[1], window=window, sinks=sinks),
        None,
        tables,
        meta(batch, kv_heads, slots, kind=torch.float32) if relative else None,
        0.125,
        Buffers(accumulated_BKS=meta(batch, kv_heads, slots, kind=torch.float32), gpu=gpu),
    )
