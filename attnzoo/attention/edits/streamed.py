"""Softmax attention as the engines read it: of the parallel form, and over whatever a cache holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.attention.edits.engine import AttentionCall, Terms
from attnzoo.attention.edits.placed import Placed
from attnzoo.attention.edits.run import LayerPlan, row_positions
from attnzoo.kvcache.base import CacheView
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.paged_decode import Entries

Attend = Callable[[Tensor, CacheView, Tensor], Tensor]


def parallel_call(qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, terms: Terms) -> AttentionCall:
    """The parallel form of (q_BNTH, k_BKSH, v_BKSH): keys of as many tokens as there are queries are of the same
    tokens, others those of a context."""
    q, k, _ = qkv
    queries_BT = row_positions(mask, q.shape[0], q.shape[2], q.device)
    of_context = k.shape[2] != q.shape[2]
    keys_BS = torch.arange(k.shape[2], device=q.device).expand(len(q), -1) if of_context else queries_BT
    return AttentionCall(*qkv, mask, terms, q.shape[-1] ** -0.5, Placed(queries_BT), keys_BS[:, None])


@dataclass(frozen=True)
class StreamedEdits:
    """A layer's edits in one call of `extend`: what caches call once they have read
    (`attnzoo.kvcache.base.EditedRead`).

    queries: where the chunk stands; mask: what the layer shows, without positions; terms: its scores; uncounted: as in
    `AttentionCall`.
    """

    plan: LayerPlan
    queries: Placed
    mask: Mask
    terms: Terms
    uncounted: bool = False

    def over(self, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor, attend: Attend) -> Tensor:
        """Attention over the view of an exact cache, with edits; without, it is `attend`."""
        replaced = self.plan.replaces(q_BNTH.shape[1], self.queries)
        out_BNTH = None if replaced else attend(q_BNTH, view, positions_BT)
        qkv = (q_BNTH, view.keys_BKSH.to(q_BNTH.dtype), view.values_BKSH.to(q_BNTH.dtype))
        return self.plan.apply(self._call(qkv, view.shown(self.mask, positions_BT), self.queries), out_BNTH)

    def __call__(self, out_BNTH: Tensor, q_BNTH: Tensor, positions_BT: Tensor, segments: Sequence[Entries]) -> Tensor:
        width, values_width = q_BNTH.shape[-1], out_BNTH.shape[-1]
        keys = [_whole(each.keys_BKSC, each.channels_BKC, width) for each in segments]
        values = [_whole(each.values_BKSV, each.value_channels_BKV, values_width) for each in segments]
        last_B1 = self.queries.positions_BT.amax(1, keepdim=True)
        queries = Placed(positions_BT.masked_fill(positions_BT > last_B1, -1))  # a row whose tokens have ended stays
        qkv = (q_BNTH, torch.cat(keys, 2), torch.cat(values, 2))
        mask = replace(self.mask, query_positions_BT=positions_BT, key_positions_BKS=_positions(segments))
        call = replace(
            self._call(qkv, mask, queries),
            log_counts_BKS=_log_counts(segments),
            approximate=any(each.channels_BKC is not None for each in segments),
            uncounted=self.uncounted,
        )
        return self.plan.apply(call, out_BNTH)

    def _call(self, qkv: tuple[Tensor, Tensor, Tensor], mask: Mask, queries: Placed) -> AttentionCall:
        assert mask.key_positions_BKS is not None
        return AttentionCall(*qkv, mask, self.terms, qkv[0].shape[-1] ** -0.5, queries, mask.key_positions_BKS)


def _whole(x_BKSC: Tensor, channels_BKC: Tensor | None, width: int) -> Tensor:
    """Entries with all channels, 0 in those that are not stored."""
    if channels_BKC is None:
        return x_BKSC
    whole = x_BKSC.new_zeros(*x_BKSC.shape[:3], width)
    return whole.scatter(-1, channels_BKC[:, :, None].expand(-1, -1, x_BKSC.shape[2], -1), x_BKSC)


def _positions(segments: Sequence[Entries]) -> Tensor:
    found = [each.placed().positions_BKS for each in segments]
    heads = max(x.shape[1] for x in found if x is not None)
    return torch.cat([x.expand(-1, heads, -1) for x in found if x is not None], dim=2)


def _log_counts(segments: Sequence[Entries]) -> Tensor | None:
    """Logarithms of how many tokens each entry stands for, None: each for itself."""
    if all(each.log_counts_BKS is None for each in segments):
        return None
    shapes = [each.keys_BKSC.shape[:3] for each in segments]
    counts = [
        each.keys_BKSC.new_zeros(shape) if each.log_counts_BKS is None else each.log_counts_BKS.expand(shape)
        for each, shape in zip(segments, shapes, strict=True)
    ]
    return torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in counts], dim=2)
