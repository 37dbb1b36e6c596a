"""Classes of keys, and fused attention over one class at a time with the logarithm of its sum of exponentials."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.attention.edits.spans import Chosen, Sinks
from attnzoo.types import accumulation_dtype


def classes_of(sets: tuple[Chosen, ...], positions_KS: Tensor, flags: dict[Sinks, Tensor]) -> tuple[Tensor, Tensor]:
    """(member_CM, class_KS): keys of one class are in the same sets; member says in which."""
    code_KS = torch.zeros_like(positions_KS)
    for bit, each in enumerate(sets):
        code_KS += each.holds(positions_KS, flags).to(code_KS.dtype) << bit
    used_C = code_KS.flatten().bincount().nonzero()[:, 0]
    bits_M = torch.arange(len(sets), device=positions_KS.device)
    number_L = torch.zeros(int(used_C[-1]) + 1, dtype=torch.int64, device=positions_KS.device)
    number_L[used_C] = torch.arange(len(used_C), device=positions_KS.device)
    return (used_C[:, None] >> bits_M & 1).bool(), number_L[code_KS]


@dataclass(frozen=True)
class ByClass:
    """Keys and values [K, S, H] of kv heads that hold the same entries: class after class, each in its order. order_S:
    which entry stands where, None: as they were. ends: where each class ends."""

    keys_KSH: Tensor
    values_KSH: Tensor
    order_S: Tensor | None
    ends: list[int]

    @staticmethod
    def of(keys_KSH: Tensor, values_KSH: Tensor, class_S: Tensor, classes: int) -> "ByClass":
        """class_S: the class of every entry, below `classes`."""
        ends = class_S.bincount(minlength=classes).cumsum(0).tolist()
        if bool((class_S[1:] >= class_S[:-1]).all()):
            return ByClass(keys_KSH, values_KSH, None, ends)
        order_S = class_S.argsort(stable=True)
        return ByClass(keys_KSH.index_select(1, order_S), values_KSH.index_select(1, order_S), order_S, ends)

    def sorted(self, x_NRS: Tensor) -> Tensor:
        """What is said of the entries, in the order of the classes."""
        return x_NRS if self.order_S is None else x_NRS.index_select(2, self.order_S)


def class_passes(
    content_NRH: Tensor, held: ByClass, visible_NRS: Tensor, added_NRS: Tensor | None, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """(lse_NRC, out_NRH of every class), -inf and 0 where a query sees none of its keys. Heads are grouped by kv head,
    as many in each."""
    visible = held.sorted(visible_NRS)
    added = None if added_NRS is None else held.sorted(added_NRS)
    seen_S, found, start = visible.flatten(0, 1).any(0), [], 0
    for end in held.ends:
        # Keys after the last one that a query of the block sees are left out.
        seen = seen_S[start:end].nonzero()[:, 0]
        used = slice(start, start + (int(seen[-1]) + 1 if len(seen) else 0))
        keys, values = held.keys_KSH[:, used], held.values_KSH[:, used]
        found.append(
            _one_class(
                content_NRH, keys, values, visible[..., used], None if added is None else added[..., used], scale
            )
        )
        start = end
    return torch.stack([lse for lse, _ in found], dim=-1), [out for _, out in found]


def _one_class(
    content_NRH: Tensor, keys_KSH: Tensor, values_KSH: Tensor, seen_NRS: Tensor, added_NRS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    heads, rows = content_NRH.shape[:2]
    dtype = accumulation_dtype(content_NRH.dtype)
    if keys_KSH.shape[1] == 0:
        empty = content_NRH.new_full((heads, rows), float("-inf"), dtype=dtype)
        return empty, content_NRH.new_zeros(heads, rows, values_KSH.shape[-1], dtype=dtype)
    mask, some = None, None
    if added_NRS is not None or not bool(seen_NRS.all()):
        some = seen_NRS.any(-1)
        zeros = content_NRH.new_zeros(()) if added_NRS is None else added_NRS.to(content_NRH.dtype)
        mask = torch.where(seen_NRS, zeros, float("-inf"))
    out, lse = lse_attention(content_NRH, keys_KSH, values_KSH, mask, scale)
    out, lse = out.to(dtype), lse.to(dtype)
    if some is not None and not bool(some.all()):  # the fused operation's answers for rows without keys say nothing
        out, lse = out.masked_fill(~some[..., None], 0.0), lse.masked_fill(~some, float("-inf"))
    return lse, out


def lse_attention(
    q_NRH: Tensor, k_KSH: Tensor, v_KSH: Tensor, mask_NRS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out_NRH, lse_NR) of softmax attention; rows without keys have anything. torch's fused operation says the
    logarithm on CPUs only; elsewhere it is computed from the scores."""
    group = len(q_NRH) // len(k_KSH)
    if q_NRH.device.type == "cpu" and q_NRH.shape[-1] == v_KSH.shape[-1]:
        if q_NRH.shape[1] == 1:  # queries that share a kv head are rows of one product
            heads = len(q_NRH)
            mask = None if mask_NRS is None else mask_NRS.expand(heads, 1, -1).reshape(1, -1, group, k_KSH.shape[1])
            out, lse = _fused(q_NRH.reshape(1, len(k_KSH), group, -1), k_KSH[None], v_KSH[None], mask, scale)
            return out.reshape(heads, 1, -1), lse.reshape(heads, 1)
        out, lse = _fused(q_NRH[None], k_KSH[None], v_KSH[None], None if mask_NRS is None else mask_NRS[None], scale)
        return out[0], lse[0]
    dtype = accumulation_dtype(q_NRH.dtype)
    k_NSH, v_NSH = (x.repeat_interleave(group, dim=0).to(dtype) for x in (k_KSH, v_KSH))
    scores = q_NRH.to(dtype) @ k_NSH.mT * scale
    scores = scores if mask_NRS is None else scores + mask_NRS
    return scores.softmax(-1).nan_to_num() @ v_NSH, scores.logsumexp(-1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse
