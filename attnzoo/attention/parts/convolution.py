"""Causal depthwise convolution of q, k and v over time, carrying the rows before the chunk.

Without the carried rows a streamed sequence is another function than the parallel form: with segments of two
tokens and a kernel of three the query convolution would see no history at all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.parts.projection import Heads
from attnzoo.kvcache.state import State, new_zeros
from attnzoo.ops.common.impl import Impl
from attnzoo.ops.depthwise_conv import depthwise_conv_qkv
from attnzoo.types import dtype_bytes

QKV = tuple[Tensor, Tensor, Tensor]
ConvInit = Literal["primer", "uniform"]


@dataclass
class QKVConvState(State):
    """The last W-1 rows of q, k and v before convolution, oldest first: [B, W-1, N or K, H]. Without key and value
    where a context is read, which is convolved once."""

    query: Tensor
    key: Tensor | None
    value: Tensor | None


class QKVConv(nn.Module):
    """One kernel per (head, channel), or per channel with `share_heads`, for each of q, k and v.

    init "primer": 0.5 on the current token and 0.5 / (W-1) on each earlier one (Primer, arXiv 2109.08668,
    spatial d-conv initialisation); "uniform": U(-1/sqrt(W), 1/sqrt(W)), torch's default for a depthwise
    convolution, which the RCMHA authors' base uses.
    """

    def __init__(self, heads: Heads, *, width: int, share_heads: bool, bias: bool, init: ConvInit) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"conv_width={width} mixes no tokens; use at least 2, or a variant without convolution")
        self.heads, self.width, self.init = heads, width, init
        self.query_kernel, self.query_bias = self._kernel(heads.num_heads, share_heads, bias)
        self.key_kernel, self.key_bias = self._kernel(heads.num_kv_heads, share_heads, bias)
        self.value_kernel, self.value_bias = self._kernel(heads.num_kv_heads, share_heads, bias)
        self.reset_parameters()

    def _kernel(self, count: int, share_heads: bool, bias: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
        rows = 1 if share_heads else count
        kernel = nn.Parameter(torch.empty(rows, self.heads.head_dim, self.width))
        return kernel, nn.Parameter(torch.empty(rows, self.heads.head_dim)) if bias else None

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        for name, parameter in self.named_parameters():
            if self.init == "uniform":
                nn.init.uniform_(parameter, -bound, bound)
            elif name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.constant_(parameter, 0.5 / (self.width - 1))
                nn.init.constant_(parameter[..., -1], 0.5)

    def forward(self, qkv: QKV, starts_BT: Tensor | None, impl: Impl) -> QKV:
        """q, k and v convolved from the start of the sequence, or of each document (`starts_BT`, see Mask); k and v of
        a context from its start."""
        return depthwise_conv_qkv(qkv, self._kernels(), biases=self._biases(), starts_BT=starts_BT, impl=impl)

    def _kernels(self) -> QKV:
        return self.query_kernel, self.key_kernel, self.value_kernel

    def _biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.query_bias, self.key_bias, self.value_bias

    def init_state(
        self, batch: int, *, device: torch.device | str | None, dtype: torch.dtype, of_context: bool = False
    ) -> QKVConvState:
        def tail(heads: int) -> Tensor:
            return new_zeros(batch, self.width - 1, heads, self.heads.head_dim, device=device, dtype=dtype)

        key, value = (None if of_context else tail(self.heads.num_kv_heads) for _ in range(2))
        return QKVConvState(tail(self.heads.num_heads), key, value)

    def extend(self, qkv: QKV, state: QKVConvState, counts_B: Tensor | None, impl: Impl) -> tuple[QKV, QKVConvState]:
        """q, k and v convolved with the carried rows, and the rows to carry on."""

        def in_dtype_of(new: Tensor, tail: Tensor | None) -> Tensor | None:
            return None if tail is None else tail.to(new.dtype)

        kept = state.query.dtype
        tails = in_dtype_of(qkv[0], state.query), in_dtype_of(qkv[1], state.key), in_dtype_of(qkv[2], state.value)
        convolved = depthwise_conv_qkv(qkv, self._kernels(), biases=self._biases(), tails=tails, impl=impl)
        query, key, value = (
            None if tail is None else _next_tail(tail, x, counts_B).to(kept) for tail, x in zip(tails, qkv, strict=True)
        )
        assert query is not None
        return convolved, QKVConvState(query, key, value)

    def state_bytes(self, batch: int, dtype: torch.dtype) -> int:
        rows = self.heads.num_heads + 2 * self.heads.num_kv_heads
        return batch * (self.width - 1) * rows * self.heads.head_dim * dtype_bytes(dtype)

    def flops(self, batch: int, tokens: int) -> int:
        rows = self.heads.num_heads + 2 * self.heads.num_kv_heads
        return 2 * batch * tokens * rows * self.heads.head_dim * self.width


def _next_tail(tail_BWNH: Tensor, x_BTNH: Tensor, counts_B: Tensor | None) -> Tensor:
    """The last W-1 real rows of [tail ; x], in memory of their own: a view would keep the whole chunk alive."""
    width = tail_BWNH.shape[1]
    if counts_B is None:
        return torch.cat([tail_BWNH[:, x_BTNH.shape[1] :], x_BTNH[:, -width:]], dim=1)
    rows = torch.cat([tail_BWNH, x_BTNH], dim=1)
    index_BW = counts_B[:, None] + torch.arange(width, device=counts_B.device)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], index_BW]
