"""Bytes that torch's fused attention holds on a CPU beyond q, k, v, the output and their gradients.

Its kernels (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13) keep tiles of scores in the dtype of sums,
one set for every thread.
"""

import torch

KEY_TILE = 512


def _query_tile(tokens: int) -> int:
    return min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)


def saved_sums(batch: int, heads: int, tokens: int, sum_width: int) -> int:
    """Bytes of the logarithms of the softmax's sums, kept for the backward pass."""
    return batch * heads * tokens * sum_width


def forward_scratch(tokens: int, head_dim: int, sum_width: int) -> int:
    """Bytes of the forward kernel's tiles: scores, their maxima and sums, outputs."""
    queries = _query_tile(tokens)
    tile = queries * min(KEY_TILE, tokens) + 2 * queries + queries * head_dim
    return torch.get_num_threads() * tile * sum_width


def backward_scratch(batch: int, heads: int, tokens: int, sum_width: int) -> int:
    """Bytes of the backward kernel's tiles (scores and their gradients), and of one sum per query."""
    tile = 2 * _query_tile(tokens) * min(KEY_TILE, tokens)
    return torch.get_num_threads() * tile * sum_width + saved_sums(batch, heads, tokens, sum_width)
