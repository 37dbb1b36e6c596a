"""Products of a few rows with cached keys and values, in the form that is fast for their dtype on this machine.

In half precision on a CPU, keys on the right of a product are transposed in memory first. A CPU without half-precision
instructions multiplies number by number: float32 copies of blocks take a third of the time for keys and a tenth for
values. For a single entry, a matrix product is not worth its start.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype

COPIED_BYTES = 4 << 20
"""Bytes of a block copied to float32."""


def with_keys(rows_BKLC: Tensor, keys_BKSC: Tensor) -> Tensor:
    """rows . keys, [B, K, L, S], in their dtype or float32."""
    if _single(keys_BKSC):
        return (rows_BKLC.to(accumulation_dtype(rows_BKLC.dtype)) * keys_BKSC).sum(-1, keepdim=True)
    if _emulated(keys_BKSC):
        return _in_blocks(lambda rows, keys: rows @ keys.mT, rows_BKLC, keys_BKSC)
    if keys_BKSC.device.type == "cpu" and keys_BKSC.itemsize < 4:
        return (keys_BKSC @ rows_BKLC.mT).mT
    return rows_BKLC @ keys_BKSC.mT


def with_values(weights_BKLS: Tensor, values_BKSV: Tensor) -> Tensor:
    """weights . values, [B, K, L, V], in the values' dtype or float32."""
    if _single(values_BKSV):
        return weights_BKLS * values_BKSV
    if _emulated(values_BKSV):
        return _in_blocks(torch.matmul, weights_BKLS, values_BKSV)
    return weights_BKLS.to(values_BKSV.dtype) @ values_BKSV


def _single(entries_BKSX: Tensor) -> bool:
    return entries_BKSX.device.type == "cpu" and entries_BKSX.shape[2] == 1


def _in_blocks(product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, entries_BKSX: Tensor) -> Tensor:
    return torch.cat([product(few.float(), block.float()) for few, block in _blocks(rows, entries_BKSX)])


def _blocks(rows: Tensor, entries_BKSX: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, COPIED_BYTES // max(1, entries_BKSX.shape[1:].numel() * 4))
    return zip(rows.split(size), entries_BKSX.split(size), strict=True)


def _emulated(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.itemsize > 2 or torch.compiler.is_compiling():
        return False
    return not _native(x.dtype)


@cache
def _native(dtype: torch.dtype) -> bool:
    """Whether this CPU has products in a half precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    check = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, check)())
