"""Linear attention of every query to every key that exists: no order, so one sum of outer products serves all queries.

o_t = q_t . sum_s k_s v_s^T  (normalised: divided by q_t . sum_s k_s). q and k come with their feature map applied.
"""

import torch
from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose
from attnzoo.ops.common.masks import Mask, check_heads, check_mask
from attnzoo.types import accumulation_dtype


def full_linear_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    keys_BS: Tensor | None = None,
    normalise: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """o_BNTH. `keys_BS` (bool): which keys exist, None: all; without any, o is zero.

    Raises ValueError when shapes do not fit, or `impl` is unknown. Two products of matrices are all there is, which are
    torch's on every device.
    """
    check_heads(q_BNTH, k_BKSH, v_BKSH)
    check_mask(Mask.full(keys_BS), q_BNTH, k_BKSH)
    run = choose("full_linear_attention", impl, {"reference": _reference, "torch": _torch, "triton": _torch}, q_BNTH)
    out: Tensor = run(q_BNTH, k_BKSH, v_BKSH, keys_BS, normalise)
    return out


def summed(k_BKSH: Tensor, v_BKSH: Tensor, keys_BS: Tensor | None, normalise: bool) -> Tensor:
    """memory_BKHH, the sum of k v^T in at least float32; with `normalise` the sum of k is its last column."""
    dtype = accumulation_dtype(k_BKSH.dtype)
    k, v = k_BKSH.to(dtype), v_BKSH.to(dtype)
    if keys_BS is not None:
        gaps = ~keys_BS[:, None, :, None]
        k, v = k.masked_fill(gaps, 0.0), v.masked_fill(gaps, 0.0)
    if normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    return k.mT @ v


def read(q_BNTH: Tensor, memory_BKHH: Tensor, normalise: bool) -> Tensor:
    """o_BNTH from the sum that `summed` made; zeros where it has no key."""
    batch, heads, tokens, head_dim = q_BNTH.shape
    q_BKLH = q_BNTH.to(memory_BKHH.dtype).reshape(batch, memory_BKHH.shape[1], -1, head_dim)
    out = (q_BKLH @ memory_BKHH).view(batch, heads, tokens, memory_BKHH.shape[-1])
    return (normalised(out) if normalise else out).to(q_BNTH.dtype)


def normalised(sums: Tensor) -> Tensor:
    """All but the last column, divided by it, which is the sum of weights; zeros where that is zero."""
    total = sums[..., -1:]
    return sums[..., :-1] / total.masked_fill(total == 0, 1.0)


def _torch(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, keys_BS: Tensor | None, normalise: bool) -> Tensor:
    return read(q_BNTH, summed(k_BKSH, v_BKSH, keys_BS, normalise), normalise)


def _reference(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, keys_BS: Tensor | None, normalise: bool) -> Tensor:
    """Query by query and key by key: what is right."""
    batch, heads, tokens, _ = q_BNTH.shape
    entries, group = k_BKSH.shape[2], heads // k_BKSH.shape[1]
    dtype = accumulation_dtype(q_BNTH.dtype)
    q, k, v = (x.to(dtype) for x in (q_BNTH, k_BKSH, v_BKSH))
    rows = []
    for b in range(batch):
        exist = [s for s in range(entries) if keys_BS is None or bool(keys_BS[b, s])]
        for n in range(heads):
            for t in range(tokens):
                weights = [(q[b, n, t] * k[b, n // group, s]).sum() for s in exist]
                total = sum(weights, torch.zeros((), dtype=dtype, device=q.device)) if normalise and exist else 1.0
                sums = torch.zeros_like(v[b, 0, 0]) if entries else q.new_zeros(v.shape[-1])
                for weight, s in zip(weights, exist, strict=True):
                    sums = sums + weight / total * v[b, n // group, s]
                rows.append(sums)
    return torch.stack(rows).view(batch, heads, tokens, v.shape[-1]).to(q_BNTH.dtype)
