"""Transformer-XL's memory for any variant: a segment also reads the last inputs of its layer, without gradient.

Source: Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860), section 3.2: h~ = [stop_gradient(memory) ; x], queries
from x, keys and values from h~.

What is kept are the layer's inputs and not its keys and values: the current weights norm and project them again in
every segment, so W_k and W_v have gradients through the memory, as in the paper. The memory is read through the
variant's own streaming form, which makes convolutions continue and a linear variant start from the memory's sum. It is
defined by segments: cut a sequence elsewhere, and a token sees another past (`window=` does not depend on cuts).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.attention.base import Attention, streaming
from attnzoo.kvcache.state import State, new_zeros


@dataclass
class SegmentMemory(State):
    """hidden_BMD: inputs of the layer, oldest first, of which the first counts_B are there."""

    hidden_BMD: Tensor
    counts_B: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        model_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SegmentMemory":
        """Nothing remembered yet, room for `length` tokens. Raises ValueError for a length below 1."""
        if length < 1:
            raise ValueError(f"memory length={length} must be at least 1")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return cls(
            new_zeros(batch, length, model_dim, device=device, dtype=dtype),
            new_zeros(batch, device=device, dtype=torch.int64),
        )


def attend_segment(
    attention: Attention, x_BTD: Tensor, memory: SegmentMemory, norm: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, SegmentMemory]:
    """(y_BTD, the memory for the next segment). `norm` stands between the layer's inputs and the attention.

    Raises ValueError for an attention without a streaming form.
    """
    y_BTD, _ = streaming(attention).extend(norm(x_BTD), read_memory(attention, memory, x_BTD.shape[1], norm))
    return y_BTD, remember(memory, x_BTD)


def read_memory(
    attention: Attention, memory: SegmentMemory, tokens: int, norm: Callable[[Tensor], Tensor] = lambda x: x
) -> State:
    """The attention's state after what is remembered, with room for `tokens` more."""
    batch, length, _ = memory.hidden_BMD.shape
    attention = streaming(attention)
    state = attention.init_state(batch, length + tokens)
    if bool((memory.counts_B > 0).any()):
        _, state = attention.extend(norm(memory.hidden_BMD), state, memory.counts_B)
    return state


def remember(memory: SegmentMemory, x_BTD: Tensor) -> SegmentMemory:
    """The memory after a segment: its last tokens, cut off from the graph."""
    batch, length, _ = memory.hidden_BMD.shape
    seen_BLD = torch.cat([memory.hidden_BMD, x_BTD.detach()], dim=1)
    # Rows of a memory that is not full yet hold a gap between what they remember and the segment.
    rest_B = (memory.counts_B + x_BTD.shape[1] - length).clamp(min=0)
    index_BM = rest_B[:, None] + torch.arange(length, device=x_BTD.device)
    index_BM = torch.where(index_BM < memory.counts_B[:, None], index_BM, index_BM - memory.counts_B[:, None] + length)
    counts_B = (memory.counts_B + x_BTD.shape[1]).clamp(max=length)
    real_BM = torch.arange(length, device=x_BTD.device) < counts_B[:, None]
    hidden_BMD = seen_BLD[torch.arange(batch, device=x_BTD.device)[:, None], index_BM.clamp(max=seen_BLD.shape[1] - 1)]
    return SegmentMemory(hidden_BMD.masked_fill(~real_BM[..., None], 0.0), counts_B)
