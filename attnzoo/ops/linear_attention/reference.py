"""The recurrence, one token at a time: defines the result."""

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype


def linear_attention_reference(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    decay_K: Tensor | None,
    memory_BKHH: Tensor | None,
    counts_B: Tensor | None,
    starts_BT: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q_BNTH.shape
    kv_heads = k_BKTH.shape[1]
    dtype = accumulation_dtype(q_BNTH.dtype)
    outputs = []
    memories = []
    for b in range(batch):
        for n in range(heads):
            kv = n // (heads // kv_heads)
            width = v_BKTH.shape[-1] + int(normalise)
            memory = torch.zeros(k_BKTH.shape[-1], width, dtype=dtype, device=q_BNTH.device)
            if memory_BKHH is not None:
                memory = memory_BKHH[b, kv]
            for t in range(tokens):
                if counts_B is not None and t >= counts_B[b]:
                    outputs.append(torch.zeros_like(v_BKTH[b, kv, t], dtype=dtype))
                    continue
                if starts_BT is not None and t == starts_BT[b, t]:
                    memory = torch.zeros_like(memory)
                value = v_BKTH[b, kv, t].to(dtype)
                if normalise:
                    value = torch.cat([value, torch.ones_like(value[:1])])
                decay = 1.0 if decay_K is None else decay_K[kv]
                memory = decay * memory + torch.outer(k_BKTH[b, kv, t].to(dtype), value)
                out = q_BNTH[b, n, t].to(dtype) @ memory
                outputs.append(out[:-1] / out[-1] if normalise else out)
            if n % (heads // kv_heads) == 0:
                memories.append(memory)
    o_BNTH = torch.stack(outputs).view(batch, heads, tokens, v_BKTH.shape[-1])
    return o_BNTH.to(q_BNTH.dtype), torch.stack(memories).view(batch, kv_heads, *memories[0].shape)
