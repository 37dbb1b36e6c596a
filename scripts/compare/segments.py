"""Training with short segments and a memory of hidden states, as the RCMHA authors do it, with and without its fault.

In Transformer-XL's recurrence (Dai et al. 2019, arXiv 1901.02860, section 3.2) the last hidden states at a layer's
input, detached, precede the segment when keys and values are computed. The RCMHA authors (arXiv 2308.03429) use
segments of 2 tokens and a memory of 32.

The fault: the queries of a segment are convolved alone. A kernel of width 3 then sees zeros instead of the tokens
before the segment, so that the segment form computes another function than the parallel form. (Keys and values are
computed from memory and segment together, and are correct.) "published" is the faulty form, "carried" the correct one;
they are equal for variants without a convolution.
"""

from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention import StreamingAttention
from attnzoo.attention.segment_memory import SegmentMemory, read_memory, remember
from attnzoo.kvcache.state import State
from attnzoo.models import DecoderLM

Form = Literal["published", "carried"]
Memory = tuple[SegmentMemory, ...]

QUERY_HISTORY = "conv.query"
"""The name, in a variant's state, of the earlier rows for the query convolution."""


def segment_forward(model: DecoderLM, tokens_BT: Tensor, memory: Memory, form: Form) -> tuple[Tensor, Memory]:
    """(logits_BTV of one segment, memory for the next segment). The form "carried" is `DecoderLM.segment`."""
    if form == "carried":
        return model.segment(tokens_BT, memory)
    x_BTD, after = model.embedding(tokens_BT), []
    for block, remembered in zip(model.layers(), memory, strict=True):
        state = read_memory(block.attention, remembered, x_BTD.shape[1], block.attention_norm)
        after.append(remember(remembered, x_BTD))
        x_BTD = x_BTD + block.attention.extend(block.attention_norm(x_BTD), without_query_history(state))[0]
        x_BTD = x_BTD + block.mlp(block.mlp_norm(x_BTD))
    return model.logits(model.norm(x_BTD)), tuple(after)


def without_query_history(state: State) -> State:
    """The fault: sets the rows before the segment to zero for the query convolution."""
    return state.map(lambda name, tensor: torch.zeros_like(tensor) if name.endswith(QUERY_HISTORY) else tensor)


def has_query_history(attention: StreamingAttention) -> bool:
    """Whether the two forms differ for this variant."""
    return any(name.endswith(QUERY_HISTORY) for name in attention.init_state(1, 1).tensors())
