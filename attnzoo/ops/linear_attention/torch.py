"""The chunked form: inside a chunk the masked product of queries and keys, between chunks the memory.

Time is linear in T: T * C within chunks of C and T * H against the memory. Chunks are taken in blocks: all chunks of a
block share their matrix products, and only a scan over their memories is sequential. The forward keeps its inputs and
the memory at the start of each block; the backward goes through the blocks from the last to the first and recomputes
the rest (as in RetNet's chunkwise form, arXiv 2307.08621, section 2.4, and gated linear attention, arXiv 2312.06635,
section 4). So a long sequence needs, beyond inputs and results, one memory per few hundred tokens.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.derived_memory import representative
from attnzoo.ops.common.first_order import first_order
from attnzoo.ops.linear_attention.weights import Weights, Work, chunks_of, tokens_of
from attnzoo.types import accumulation_dtype


def linear_attention_torch(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    decay_K: Tensor | None,
    memory_BKHH: Tensor | None,
    counts_B: Tensor | None,
    starts_BT: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    if q_BNTH.shape[2] == 1:
        with _exact(q_BNTH):
            return _one_token(q_BNTH, k_BKTH, v_BKTH, decay_K, memory_BKHH, counts_B, normalise)
    if memory_BKHH is None:
        shape = (*k_BKTH.shape[:2], k_BKTH.shape[3], v_BKTH.shape[3] + int(normalise))
        memory_BKHH = q_BNTH.new_zeros(shape, dtype=accumulation_dtype(q_BNTH.dtype))
    out: tuple[Tensor, Tensor] = _LinearAttention.apply(
        q_BNTH, k_BKTH, v_BKTH, decay_K, memory_BKHH, counts_B, starts_BT, normalise
    )
    return out


def _exact(x: Tensor) -> torch.autocast:
    """Turns autocast off, which would round the sums over time to bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def _one_token(
    q_BN1H: Tensor,
    k_BK1H: Tensor,
    v_BK1H: Tensor,
    decay_K: Tensor | None,
    memory_BKHH: Tensor | None,
    counts_B: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Decoding: adds one outer product to the memory and reads it once, in operations that autograd differentiates."""
    dtype = accumulation_dtype(q_BN1H.dtype)
    batch, heads, _, head_dim = q_BN1H.shape
    q_BKGH = q_BN1H.to(dtype).reshape(batch, k_BK1H.shape[1], -1, head_dim)
    k_BKH1, v_BK1H = k_BK1H.to(dtype).mT, v_BK1H.to(dtype)
    if normalise:
        v_BK1H = F.pad(v_BK1H, (0, 1), value=1.0)
    real_B111 = None
    if counts_B is not None:
        real_B111 = (counts_B > 0)[:, None, None, None]
        q_BKGH, k_BKH1, v_BK1H = (torch.where(real_B111, x, 0.0) for x in (q_BKGH, k_BKH1, v_BK1H))
    if memory_BKHH is None:
        after = k_BKH1 * v_BK1H
    else:
        if decay_K is None:
            after = torch.addcmul(memory_BKHH, k_BKH1, v_BK1H)
        else:
            after = (memory_BKHH * decay_K.to(dtype)[:, None, None]).addcmul_(k_BKH1, v_BK1H)
        if real_B111 is not None:
            after = torch.where(real_B111, after, memory_BKHH)
    o_BKGH = torch.matmul(q_BKGH, after)
    if normalise:
        weight_BKG1 = o_BKGH[..., -1:]
        if real_B111 is not None:
            weight_BKG1 = torch.where(real_B111, weight_BKG1, 1.0)
        o_BKGH = o_BKGH[..., :-1] / weight_BKG1
    return o_BKGH.reshape(batch, heads, 1, -1).to(q_BN1H.dtype), after


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BKTH: Tensor,
        v_BKTH: Tensor,
        decay_K: Tensor | None,
        memory_BKHH: Tensor,
        counts_B: Tensor | None,
        starts_BT: Tensor | None,
        normalise: bool,
    ) -> tuple[Tensor, Tensor]:
        work = Work.of(q_BNTH, k_BKTH, decay_K, counts_B, starts_BT)
        keep = any(ctx.needs_input_grad)
        memory = memory_BKHH.to(work.dtype)
        o_BNTH = q_BNTH.new_empty(*q_BNTH.shape[:3], v_BKTH.shape[-1])
        total_BNT = o_BNTH.new_empty(o_BNTH.shape[:3], dtype=work.dtype) if normalise else None
        blocks = list(enumerate(work.blocks()))
        memories = memory.new_empty(len(blocks), *memory.shape) if keep else None
        for index, (start, end) in representative(blocks):
            if memories is not None:
                memories[index] = memory
            q, k, v = _load(work, q_BNTH, k_BKTH, v_BKTH, normalise, start, end)
            with _exact(q):
                o, memory = _block(q, k, v, memory, work.weights(start, end))
            o = tokens_of(o, work, end - start)
            if total_BNT is not None:
                total = work.masked(o[..., -1:], start, 1.0)
                total_BNT[:, :, start:end] = total[..., 0]
                o = o[..., :-1] / total
            o_BNTH[:, :, start:end] = o
        ctx.normalise = normalise
        if memories is not None:
            saved = o_BNTH if normalise else None
            ctx.save_for_backward(q_BNTH, k_BKTH, v_BKTH, decay_K, counts_B, starts_BT, saved, total_BNT, memories)
        return o_BNTH, memory

    @staticmethod
    @first_order("linear attention")
    def backward(ctx: Any, do_BNTH: Tensor, dmemory_BKHH: Tensor) -> tuple[Tensor | None, ...]:
        q_BNTH, k_BKTH, v_BKTH, decay_K, counts_B, starts_BT, o_BNTH, total_BNT, memories = ctx.saved_tensors
        work = Work.of(q_BNTH, k_BKTH, decay_K, counts_B, starts_BT)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BNTH, k_BKTH, v_BKTH))
        ddecay = torch.zeros_like(decay_K, dtype=work.dtype) if ctx.needs_input_grad[3] else None
        dmemory = dmemory_BKHH.to(work.dtype)
        for index, (start, end) in representative(list(enumerate(work.blocks()))[::-1], largest="last"):
            q, k, v = _load(work, q_BNTH, k_BKTH, v_BKTH, ctx.normalise, start, end)
            do = chunks_of(do_BNTH[:, :, start:end], work, start)
            if o_BNTH is not None:
                total = chunks_of(total_BNT[:, :, start:end, None], work, start, padding=1.0)
                o = chunks_of(o_BNTH[:, :, start:end], work, start)
                do = torch.cat([do, -(do * o).sum(-1, keepdim=True)], dim=-1) / total
            weights = work.weights(start, end, slopes=ddecay is not None)
            with _exact(q):
                (dq_block, dk_block, dv_block), dmemory = _block_backward(
                    (q, k, v), memories[index], do, dmemory, weights, ddecay
                )
            dq[:, :, start:end] = tokens_of(dq_block, work, end - start)
            dk[:, :, start:end] = tokens_of(dk_block, work, end - start)
            dv[:, :, start:end] = tokens_of(dv_block, work, end - start)[..., : dv.shape[-1]]
        return dq, dk, dv, ddecay, dmemory, None, None, None


def _load(
    work: Work, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, normalise: bool, start: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a block in chunks; the normaliser is the sum of a value that is 1 for every real token."""
    q, k, v = (x[:, :, start:end] for x in (q_BNTH, k_BKTH, v_BKTH))
    if normalise:
        v = F.pad(v, (0, 1), value=1.0)
    return chunks_of(q, work, start), chunks_of(k, work, start), chunks_of(v, work, start)


def _scan(added: Tensor, first: Tensor, weights: Weights, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """(the memory at the start of each chunk of a block, the memory after it): next = kept * memory + added."""
    memories, after = torch.empty_like(added), torch.empty_like(first)
    order = list(range(added.shape[2]))
    if backwards:
        order.reverse()
    memories[:, :, order[0]] = first
    for i, following in itertools.zip_longest(order, order[1:]):
        out = after if following is None else memories[:, :, following]
        if weights.kept is None:
            torch.add(added[:, :, i], memories[:, :, i], out=out)
        else:
            torch.addcmul(added[:, :, i], memories[:, :, i], weights.kept[:, :, i], out=out)
    return memories, after


def _block(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """Outputs of a block's chunks and the memory after it."""
    memories, memory = _scan(torch.matmul(weights.aged(k).mT, v), memory, weights)
    o = torch.matmul(weights.inside_(torch.matmul(q, k.mT)), v)
    return _add_product_(o, weights.carried(q), memories), memory


def _block_backward(
    qkv: tuple[Tensor, Tensor, Tensor],
    memory: Tensor,
    do: Tensor,
    dmemory: Tensor,
    weights: Weights,
    ddecay: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of a block's q, k and v, and of the memory before it; adds to `ddecay` in place."""
    q, k, v = qkv
    aged_k = weights.aged(k)
    memories, _ = _scan(torch.matmul(aged_k.mT, v), memory, weights)
    dmemories, dmemory = _scan(torch.matmul(weights.carried(q).mT, do), dmemory, weights, backwards=True)
    scores, dscores = torch.matmul(q, k.mT), torch.matmul(do, v.mT)
    dq_carried, dk_aged = torch.matmul(do, memories.mT), torch.matmul(v, dmemories.mT)
    if ddecay is not None:
        weights.add_slopes_(ddecay, scores * dscores, q * dq_carried, k * dk_aged, memories * dmemories)
    scores, dscores = weights.inside_(scores), weights.inside_(dscores)
    dq = _add_product_(weights.carried(dq_carried), dscores, k)
    dk = _add_product_(weights.aged(dk_aged), dscores.mT, q)
    dv = _add_product_(torch.matmul(aged_k, dmemories), scores.mT, do)
    return (dq, dk, dv), dmemory


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, without a tensor for the product."""
    total.view(-1, *total.shape[3:]).baddbmm_(left.flatten(0, 2), right.flatten(0, 2))
    return total
