"""Attention over one class of keys at a time, with the logarithm of its sum of exponentials."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attnzoo.types import accumulation_dtype

FEW_KEYS = 64
"""Classes of at most so many keys, such as sinks, are products of their own: a fused pass over them costs as much as
one over more."""


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


@dataclass(frozen=True)
class Passes:
    """Attention over the keys of every class. lse_NRC: -inf where a query sees none of them; classes lie apart in
    memory. many: classes of many keys by number, with out_NRH, which are finite and say nothing where a query sees none
    of them."""

    lse_NRC: Tensor
    many: list[tuple[int, Tensor]]
    few: "FewKeys | None"
    values_dim: int

    def total(self, weights_NRC: Tensor) -> Tensor:
        """out_NRH where classes have the given weights, 0 for those of which a query sees no key."""
        if self.few is None:
            total = weights_NRC.new_zeros(*weights_NRC.shape[:2], self.values_dim)
        else:
            total = self.few.total(weights_NRC)
        for number, out_NRH in self.many:
            total.addcmul_(weights_NRC[..., number, None], out_NRH)
        return total


@dataclass(frozen=True)
class FewKeys:
    """The keys of small classes, one class after another: for the rows (heads, then queries) of a kv head their scores'
    exponentials, as parts of the largest of the class; values_KXH; and each class's number, where its keys stand, and
    the sums_K1L of its exponentials."""

    exponentials_KXL: Tensor
    values_KXH: Tensor
    classes: list[tuple[int, slice, Tensor]]

    def total(self, weights_NRC: Tensor) -> Tensor:
        """out_NRH of classes with the given weights."""
        heads, rows, _ = weights_NRC.shape
        kv_heads = len(self.exponentials_KXL)
        weighted_KXL = torch.empty_like(self.exponentials_KXL)
        for number, used, sums_K1L in self.classes:
            share_K1L = weights_NRC[..., number].reshape(kv_heads, 1, -1) / torch.where(sums_K1L == 0, 1.0, sums_K1L)
            torch.mul(self.exponentials_KXL[:, used], share_K1L, out=weighted_KXL[:, used])
        return torch.bmm(weighted_KXL.mT, self.values_KXH).view(heads, rows, -1)


def class_passes(
    content_NRH: Tensor, held: ByClass, visible_NRS: Tensor, added_NRS: Tensor | None, scale: float
) -> Passes:
    """Heads are grouped by kv head, as many in each. visible_NRS, added_NRS: in the order of classes."""
    heads, rows = content_NRH.shape[:2]
    dtype = accumulation_dtype(content_NRH.dtype)
    # Of bytes, the largest is found thirty times as fast as whether any is True.
    seen_S = visible_NRS.view(torch.uint8).amax((0, 1))
    nothing = content_NRH.new_full((heads, rows), float("-inf"), dtype=dtype)
    lse_C, many, few = [nothing for _ in held.ends], [], []
    for number, (start, end) in enumerate(pairwise([0, *held.ends])):
        # Keys after the last one that a query of the block sees are left out.
        seen = seen_S[start:end].nonzero()[:, 0]
        used = slice(start, start + (int(seen[-1]) + 1 if len(seen) else 0))
        if used.stop == start:
            continue
        if used.stop - start <= FEW_KEYS:
            few.append((number, used))
            continue
        added = None if added_NRS is None else added_NRS[..., used]
        keys, values = held.keys_KSH[:, used], held.values_KSH[:, used]
        lse_C[number], out_NRH = _one_class(content_NRH, keys, values, visible_NRS[..., used], added, scale)
        many.append((number, out_NRH))
    small = None
    if few:
        small, found = _few_keys(content_NRH, held, few, visible_NRS, added_NRS, scale)
        for (number, _), lse_NR in zip(few, found, strict=True):
            lse_C[number] = lse_NR
    return Passes(torch.stack(lse_C).movedim(0, -1), many, small, held.values_KSH.shape[-1])


def _few_keys(
    content_NRH: Tensor,
    held: ByClass,
    classes: list[tuple[int, slice]],
    visible_NRS: Tensor,
    added_NRS: Tensor | None,
    scale: float,
) -> tuple[FewKeys, list[Tensor]]:
    """(the keys of small classes, lse_NR of each). Keys stand before rows in memory: so the largest of some keys and
    sums over them are found for many rows at once."""
    kv_heads, dtype = len(held.keys_KSH), accumulation_dtype(content_NRH.dtype)
    slices = [used for _, used in classes]
    keys_KXH, values_KXH = (_parts(x, slices, 1).to(dtype) for x in (held.keys_KSH, held.values_KSH))
    rows_KLH = content_NRH.to(dtype).reshape(kv_heads, -1, content_NRH.shape[-1])
    scores_KXL = torch.bmm(keys_KXH, rows_KLH.mT).mul_(scale)
    if added_NRS is not None:
        scores_KXL += _keys_first(_parts(added_NRS, slices, 2), content_NRH, kv_heads)
    visible = _parts(visible_NRS, slices, 2)
    if not bool(visible.all()):
        scores_KXL.masked_fill_(~_keys_first(visible, content_NRH, kv_heads), float("-inf"))
    placed, start, lse = [], 0, []
    for number, used in classes:
        keys = slice(start, start := start + used.stop - used.start)
        part = scores_KXL[:, keys]
        top_K1L = part.amax(1, keepdim=True)
        top_K1L = top_K1L.masked_fill(top_K1L == float("-inf"), 0.0)
        sums_K1L = part.sub_(top_K1L).exp_().sum(1, keepdim=True)
        lse.append(sums_K1L.log().add_(top_K1L).view(content_NRH.shape[:2]))
        placed.append((number, keys, sums_K1L))
    return FewKeys(scores_KXL, values_KXH, placed), lse


def _parts(x: Tensor, slices: list[slice], dim: int) -> Tensor:
    found = [x.narrow(dim, used.start, used.stop - used.start) for used in slices]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _keys_first(x_NRX: Tensor, content_NRH: Tensor, kv_heads: int) -> Tensor:
    """x_KXL of what is said of heads, or of all, and of queries, or of all; of one kv head where all have the same."""
    group = len(content_NRH) // kv_heads
    x_NRX = x_NRX.expand(-1, content_NRH.shape[1], -1)
    x_KGRX = x_NRX[:, None].expand(-1, group, -1, -1) if len(x_NRX) == 1 else x_NRX.unflatten(0, (kv_heads, group))
    return x_KGRX.permute(0, 3, 1, 2).flatten(2)


def _one_class(
    content_NRH: Tensor, keys_KSH: Tensor, values_KSH: Tensor, seen_NRS: Tensor, added_NRS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(lse_NR, out_NRH), -inf and finite numbers where a query sees none of the keys."""
    dtype = accumulation_dtype(content_NRH.dtype)
    mask, some = None, None
    seen = seen_NRS.view(torch.uint8)
    if added_NRS is not None or not bool(seen.amin()):
        some = seen.amax(-1).bool()
        # A finite number hides, too, and rows without keys get finite outputs; but a bias may be as low.
        lowest = torch.finfo(content_NRH.dtype).min if added_NRS is None else float("-inf")
        shown = content_NRH.new_zeros(()) if added_NRS is None else added_NRS.to(content_NRH.dtype)
        mask = torch.where(seen_NRS, shown, lowest)
    out, lse = lse_attention(content_NRH, keys_KSH, values_KSH, mask, scale)
    out, lse = out.to(dtype), lse.to(dtype)
    if some is not None and not bool(some.all()):  # the fused operation's answers for rows without keys say nothing
        out = out if added_NRS is None else out.masked_fill(~some[..., None], 0.0)
        lse = lse.masked_fill(~some, float("-inf"))
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
