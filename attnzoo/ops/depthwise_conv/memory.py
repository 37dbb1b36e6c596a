"""Bytes that the convolution holds beyond its inputs and results. Follows the code of `torch.py`."""

from attnzoo.ops.depthwise_conv import torch as implementation


def backward_scratch(batch: int, tokens: int, channels: int, taps: int, width: int, sum_width: int) -> int:
    """Bytes of the tiles (one per tap) in which the kernel's gradient is summed, of that gradient, and of both factors
    of the products where they are widened to the dtype of sums."""
    row = max(1, channels * width)
    size = max(1, implementation.TILE_BYTES // row)
    rows = min(batch, max(1, size // max(1, tokens)))
    tile = channels * sum_width * rows * min(size, tokens)
    return taps * (tile + channels * sum_width) + (2 * tile if width != sum_width else 0)
