"""Bytes and FLOPs of decode attention over a compressed cache."""

from dataclasses import dataclass

from attnzoo.ops.common.cost import OpCost

INDEX, SUM = 8, 4
"""Bytes of a position or channel, and of a number in the accumulation dtype of float32 and narrower."""


@dataclass(frozen=True, kw_only=True)
class SegmentSizes:
    """slots: entries held per kv head (empty slots are skipped). key_dim and value_dim: channels stored;
    position_heads: 1 where kv heads hold the same entries, else their number."""

    slots: int
    key_dim: int
    value_dim: int
    position_heads: int
    merge_counts: bool = False
    channels: bool = False
    value_channels: bool = False


@dataclass(frozen=True, kw_only=True)
class DecodeSizes:
    """width, bias_width: bytes of an element of keys and of the bias (0: no bias). probe_dim: channels of the probe,
    which is multiplied with the keys of the first segment (0: none). `scratch_bytes` are not counted."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    segments: tuple[SegmentSizes, ...]
    probe_dim: int = 0
    bias_width: int = 0
    accumulated_attention: bool = False


def decode_cost(sizes: DecodeSizes) -> OpCost:
    slots = sum(part.slots for part in sizes.segments)
    rows, kv_rows = sizes.batch * sizes.heads * sizes.tokens, sizes.batch * sizes.kv_heads
    read = rows * (sizes.head_dim * sizes.width + slots * sizes.bias_width) + sizes.batch * sizes.tokens * INDEX
    read += sizes.batch * sum(_segment_bytes(part, sizes.kv_heads, sizes.width) for part in sizes.segments)
    written = rows * sizes.head_dim * sizes.width
    flops = 2 * rows * sum(part.slots * (part.key_dim + part.value_dim) for part in sizes.segments)
    if sizes.probe_dim:
        read += kv_rows * sizes.probe_dim * sizes.width
        written += kv_rows * sizes.segments[0].slots * SUM
        flops += 2 * kv_rows * sizes.segments[0].slots * sizes.probe_dim
    if sizes.accumulated_attention:
        written += kv_rows * slots * SUM
    return OpCost(bytes_read=read, bytes_written=written, flops=flops)


def _segment_bytes(part: SegmentSizes, kv_heads: int, width: int) -> int:
    """Bytes of a segment of one sequence."""
    entry = (part.key_dim + part.value_dim) * width + (SUM if part.merge_counts else 0)
    index = part.key_dim * int(part.channels) + part.value_dim * int(part.value_channels)
    return kv_heads * (part.slots * entry + index * INDEX) + part.position_heads * part.slots * INDEX


def scratch_bytes(
    *, batch: int, tokens: int, heads: int, head_dim: int, splits: int, slots: int, accumulated_attention: bool = False
) -> int:
    """Bytes that the kernels keep between their launches, each written and read once: partial results of `splits` parts
    of the context with the logs of their sums; with accumulated_attention the scores of all `slots` and a sum per
    query."""
    rows = batch * heads * tokens
    return SUM * rows * (splits * (head_dim + 1) + (slots + 1 if accumulated_attention else 0))
