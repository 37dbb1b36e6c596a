"""Training by short segments with a memory of hidden states, as the RCMHA authors do it, with and without its fault.

Transformer-XL's recurrence (Dai et al. 2019, arXiv 1901.02860, section 3.2): the last hidden states at a layer's
input, detached, stand before the segment where keys and values are computed. The RCMHA authors (arXiv 2308.03429)
do this with segments of 2 tokens and a memory of 32.

The fault: they convolve the queries of the segment alone. A kernel of width 3 then looks at zeros instead of the
tokens before the segment, so that the segment form is another function than the parallel form; keys and values, which
are computed from memory and segment together, do have their history. "published" is that form, "carried" the right
one. They are the same where there is no convolution.
"""

from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.kvcache.state import State
from attnzoo.models import DecoderLM

Form = Literal["published", "carried"]
Memory = tuple[Tensor, ...]
"""One tensor [B, M, D] a layer: the last M hidden states at its input, M growing from 0 to what is kept."""

QUERY_HISTORY = "conv.query"
"""Name of the carried rows of the query convolution in a variant's state."""


def empty_memory(model: DecoderLM, batch: int) -> Memory:
    """The memory before the first segment."""
    weight = model.embedding.weight
    empty = torch.zeros(batch, 0, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return tuple(empty for _ in model.layers())


def segment_forward(
    model: DecoderLM, tokens_BT: Tensor, memory: Memory, keep: int, form: Form
) -> tuple[Tensor, Memory]:
    """(logits_BTV of one segment, the memory for the next): the last `keep` hidden states at each layer's input."""
    x_BTD = model.embedding(tokens_BT)
    kept = []
    for block, old_BMD in zip(model.layers(), memory, strict=True):
        kept.append(torch.cat([old_BMD, x_BTD.detach()], dim=1)[:, -keep:])
        x_BTD = x_BTD + attend(block.attention, block.attention_norm(old_BMD), block.attention_norm(x_BTD), form)
        x_BTD = x_BTD + block.mlp(block.mlp_norm(x_BTD))
    return model.logits(model.norm(x_BTD)), tuple(kept)


def attend(attention: Attention, memory_BMD: Tensor, x_BTD: Tensor, form: Form) -> Tensor:
    """y_BTD of a segment: keys and values of memory and segment, queries of the segment."""
    batch, remembered = memory_BMD.shape[:2]
    state = attention.init_state(batch, remembered + x_BTD.shape[1])
    if remembered:
        _, state = attention.extend(memory_BMD, state)
    if form == "published":
        state = without_query_history(state)
    return attention.extend(x_BTD, state)[0]


def without_query_history(state: State) -> State:
    """THE FAULT: the query convolution forgets what came before the segment."""
    return state.map(lambda name, tensor: torch.zeros_like(tensor) if name.endswith(QUERY_HISTORY) else tensor)


def has_query_history(attention: Attention) -> bool:
    """Whether the two forms differ for this variant."""
    return any(name.endswith(QUERY_HISTORY) for name in attention.init_state(1, 1).tensors())
