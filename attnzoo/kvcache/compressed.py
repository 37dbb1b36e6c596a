"""What compressing caches share: a state of compressed entries, then a tail of whole ones, and attention over it.

Before `compress` there are no compressed entries, and the tail is the full cache. Autograd is refused: evicted tokens
have no gradient.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kvcache.base import (
    EMPTY,
    CachePolicy,
    CacheSize,
    CacheState,
    CacheView,
    NewTokens,
    Occupied,
    ScoreFunction,
    attend_view,
    check_chunk,
)
from attnzoo.kvcache.full import FullCacheState
from attnzoo.kvcache.full import append as append_all
from attnzoo.kvcache.state import axes
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.rows import known
from attnzoo.ops.common.step_inputs import StepInputs
from attnzoo.ops.paged_decode import Decoded, Entries, paged_decode
from attnzoo.types import accumulation_dtype

PAGE = 64
"""A tail grows by multiples of this many slots."""
BLOCK_BYTES = 64 << 20
"""Bytes of attention scores over a compressed cache that are computed at once."""


@dataclass
class CompressedState(CacheState):
    """Base of the states of compressing policies, each of which adds its own compressed entries, in P slots (`slots`).

    tail: whole entries, slot s holds position starts_B + s. ended_B (bool): the prompt has ended, so that no later
    call of `compress` is due.
    """

    tail: FullCacheState
    starts_B: Tensor
    ended_B: Tensor

    @abstractmethod
    def held(self) -> Tensor:
        """held_B: how many slots hold an entry, the first ones."""

    @abstractmethod
    def positions(self) -> Tensor:
        """int64 positions of the compressed entries, of [B, 1 or K, P], anything in empty slots."""

    @abstractmethod
    def compressed(self) -> Entries:
        """The compressed entries, without positions."""

    @property
    def heads(self) -> tuple[int, int]:
        return self.tail.heads

    @property
    def reading(self) -> bool:
        return not bool(self.ended_B.any())

    def shares(self, after: Any) -> bool:
        return isinstance(after, CompressedState) and self.tail.shares(after.tail)

    def empty(self) -> Tensor:
        """empty_B1P (bool): slots without an entry."""
        return (torch.arange(self.slots, device=self.starts_B.device) >= self.held()[:, None])[:, None]

    def all_held(self) -> bool:
        """Whether no slot is empty. False on a GPU, where looking would mean to wait for it."""
        return self.starts_B.device.type == "cpu" and known(self.held() >= self.slots)

    def placed(self, all_held: bool = False) -> Entries:
        """The compressed entries with positions, `EMPTY` in empty slots. all_held: it is known that none is."""
        at = self.positions()
        return replace(self.compressed(), positions_BKS=at if all_held else torch.where(self.empty(), EMPTY, at))

    def tail_slots(self, length: int, row: int) -> int:
        """How many of the last tokens of a sequence are whole entries."""
        return length - int(self.starts_B[row])

    def occupied(self, row: int, length: int) -> Occupied:
        filled = {"P": int(self.held()[row]) if self.slots else 0, "S": self.tail_slots(length, row)}
        total = 0
        for name, x in self.rows(slice(row, row + 1)).tensors().items():
            letter = next((letter for letter in axes(name) if letter in filled), None)
            total += x.nbytes if letter is None else x.nbytes * filled[letter] // max(1, x.shape[2])
        entries = self.compressed()
        lost = entries.channels_BKC is not None or entries.value_channels_BKV is not None
        return Occupied(sum(filled.values()), total, lost and filled["P"] > 0)


class CompressingCache(CachePolicy):
    """Base of policies that may keep less; `config` says `prefill`."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.prefill = str(config.prefill)

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Whether this configuration never compresses anything."""

    @abstractmethod
    def empty(self, size: CacheSize, *, tail: int, prefix: int = 0, ended: bool = False) -> CompressedState:
        """A state without a token, with room for `tail` whole and `prefix` compressed entries. ended: with the tensors
        that there are once the prompt has ended."""

    @abstractmethod
    def read(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, CompressedState]:
        """`attend`, for q, k and v in the dtype of the cache."""

    def init(self, size: CacheSize, capacity: int) -> CompressedState:
        return self.empty(size, tail=capacity)

    def attend(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, CompressedState]:
        check_chunk(new.k_BKTH)
        qkv, dtype = (new.q_BNTH, new.k_BKTH, new.v_BKTH), state.tail.keys_BKSH.dtype
        if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
            raise ValueError("a compressed cache has no gradients: extend under torch.no_grad(), or use cache=None")
        q, k, v = (x.to(dtype) for x in qkv)
        out, state = self.read(state, score_function, NewTokens(q, k, v, new.step))
        return out.to(qkv[0].dtype), state


def empty_tail(policy: CachePolicy, size: CacheSize, slots: int) -> dict[str, Any]:
    """The fields of every `CompressedState` without a token, with `slots` slots in its tail."""
    return {
        "policy": policy,
        "tail": FullCacheState(size.heads(slots, size.head_dim), size.heads(slots, size.head_dim)),
        "starts_B": size.zeros(dtype=torch.int64),
        "ended_B": size.zeros(dtype=torch.bool),
    }


def least_kept(config: Any) -> int:
    """The fewest tokens that a policy with `TokenOptions` keeps of a longer prompt."""
    if config.max_tokens is not None:
        return int(config.least)
    return int(max(config.least, PAGE if config.min_tokens is None else config.min_tokens))


def append(state: Any, new: NewTokens) -> tuple[Any, CacheView]:
    """Appends a chunk to the tail: (new state, view of the tail with logical positions)."""
    tail, step = state.tail, new.step
    if state.slots:  # without compressed entries every tail begins at position 0
        step = StepInputs.of(step.before() - state.starts_B, step.tokens, step.counts_B)
    if state.slots or not state.reading:
        # The tail grows by pages instead of doubling, to keep memory after the prompt small.
        needed = max(step.integers()[0]) + new.tokens
        tail = FullCacheState(paged(tail.keys_BKSH, needed), paged(tail.values_BKSH, needed))
    tail, view = append_all(tail, new.k_BKTH, new.v_BKTH, step)
    if state.slots:
        places = torch.where(view.positions_BKS >= 0, view.positions_BKS + state.starts_B[:, None, None], EMPTY)
        view = CacheView(view.keys_BKSH, view.values_BKSH, places)
    return replace(state, tail=tail), view


def filled_tail(state: CompressedState, lengths_B: Tensor) -> CacheView:
    """View of the tail's slots that the longest sequence fills."""
    used = int((lengths_B - state.starts_B).max())
    at_BS = state.starts_B[:, None] + torch.arange(used, device=lengths_B.device)
    at_BS = at_BS.masked_fill(at_BS >= lengths_B[:, None], EMPTY)
    return CacheView(state.tail.keys_BKSH[:, :, :used], state.tail.values_BKSH[:, :, :used], at_BS[:, None])


def paged(buffer_BKSX: Tensor, needed: int) -> Tensor:
    """The buffer with at least `needed` slots, in whole pages where it grows."""
    missing = needed - buffer_BKSX.shape[2]
    if missing <= 0:
        return buffer_BKSX
    return F.pad(buffer_BKSX, (0, 0, 0, pages(needed) - buffer_BKSX.shape[2]))


def pages(slots: int) -> int:
    """`slots` rounded up to whole pages."""
    return -(-slots // PAGE) * PAGE


def prefix_entries(state: CompressedState, score_function: ScoreFunction, *, held: bool) -> Entries:
    """The compressed entries in the form that `paged_decode` reads. held: every slot holds one."""
    # Kernels skip empty slots by their positions; in torch it is cheaper to give empty slots a log count of -inf.
    if score_function.relative or state.starts_B.device.type != "cpu":
        return state.placed(held)
    entries = state.compressed()
    if held:
        return entries
    keys, logs = entries.keys_BKSC, entries.log_counts_BKS
    if logs is None:
        logs = torch.zeros((), dtype=accumulation_dtype(keys.dtype))
    return replace(entries, log_counts_BKS=torch.where(state.empty(), -torch.inf, logs).expand(keys.shape[:3]))


def attend(
    state: CompressedState, score_function: ScoreFunction, q_BNTH: Tensor, view: CacheView, positions_BT: Tensor
) -> Tensor:
    """o_BNTH over the compressed entries and a view of the tail."""
    if state.slots == 0:
        return attend_view(score_function, q_BNTH, view, positions_BT)
    tail = Entries(keys_BKSC=view.keys_BKSH, values_BKSV=view.values_BKSH, positions_BKS=view.positions_BKS)
    if whole(state.compressed()) and (q_BNTH.shape[2] > 1 or "terms" not in score_function.says):
        out_BNTH = score_function.attend(q_BNTH, joined(state, view), positions_BT)
    else:
        prefix = prefix_entries(state, score_function, held=state.all_held())
        out_BNTH = read(score_function, q_BNTH, positions_BT, prefix, tail).out_BNTH
    if score_function.edits is None:
        return out_BNTH
    return score_function.edits(out_BNTH, q_BNTH, positions_BT, [state.placed(), tail])


def whole(entries: Entries) -> bool:
    """Whether entries have all channels and count as one token: any attention can read them."""
    return entries.channels_BKC is None and entries.value_channels_BKV is None and entries.log_counts_BKS is None


def joined(state: CompressedState, view: CacheView) -> CacheView:
    """Compressed entries with all channels, then a view of others, as one view."""
    if state.slots == 0:
        return view
    entries = state.placed()
    assert entries.positions_BKS is not None
    return CacheView(
        torch.cat([entries.keys_BKSC, view.keys_BKSH], dim=2),
        torch.cat([entries.values_BKSV, view.values_BKSH], dim=2),
        _concatenated(entries.positions_BKS, view.positions_BKS),
    )


def read(
    score_function: ScoreFunction,
    q_BNTH: Tensor,
    positions_BT: Tensor,
    prefix: Entries,
    tail: Entries,
    *,
    probe_BKC: Tensor | None = None,
    accumulated_attention: bool = False,
) -> Decoded:
    """`paged_decode` with the variant's scores, in blocks of queries whose scores take about `BLOCK_BYTES`.

    Entries must have positions where the score function is relative.
    """
    batch, num_heads, tokens, _ = q_BNTH.shape
    rows = max(1, BLOCK_BYTES // max(1, batch * num_heads * (prefix.slots + tail.slots) * 4))
    keys_BKS = None
    if score_function.relative:
        assert prefix.positions_BKS is not None
        assert tail.positions_BKS is not None
        keys_BKS = _concatenated(prefix.positions_BKS, tail.positions_BKS)
    parts = []
    for first in range(0, tokens, rows):
        block = slice(first, first + rows)
        content, bias = q_BNTH[:, :, block], None
        if keys_BKS is not None:
            mask = Mask(query_positions_BT=positions_BT[:, block], key_positions_BKS=keys_BKS)
            content, bias = score_function.terms(content, mask)
        parts.append(
            paged_decode(
                content,
                prefix,
                tail,
                query_positions_BT=positions_BT[:, block],
                bias_BNTS=bias,
                probe_BKC=probe_BKC,
                accumulated_attention=accumulated_attention,
                impl=score_function.impl,
            )
        )
    if len(parts) == 1:
        return parts[0]
    assert not accumulated_attention, "the operation accumulated_attention sums over many queries"
    return replace(parts[0], out_BNTH=torch.cat([part.out_BNTH for part in parts], dim=2))


def _concatenated(first_BKS: Tensor, second_BKS: Tensor) -> Tensor:
    """Positions of two segments, concatenated; the K axis stays 1 where both have 1."""
    heads = max(first_BKS.shape[1], second_BKS.shape[1])
    return torch.cat([first_BKS.expand(-1, heads, -1), second_BKS.expand(-1, heads, -1)], dim=2)


def last_queries(before_BNWH: Tensor, q_BNTH: Tensor, new: NewTokens, window: int) -> Tensor:
    """The last real queries of before_BNWH followed by q_BNTH, those of a chunk, newest last: `window` of them, fewer
    where no sequence is as long. Shorter sequences have zeros in front."""
    width = before_BNWH.shape[2]
    if width < window:
        width = max(width, min(window, max(new.step.integers()[0]) + new.tokens))
    rows = torch.cat([front_padded(before_BNWH, width), q_BNTH], dim=2)
    if new.step.counts_B is None:
        return rows[:, :, rows.shape[2] - width :].clone()
    index_BW = new.step.counts_B[:, None] + torch.arange(width, device=q_BNTH.device)
    return rows.gather(2, index_BW[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def front_padded(queries_BNWH: Tensor, width: int) -> Tensor:
    """The queries with zeros in front, `width` in all."""
    return F.pad(queries_BNWH, (0, 0, width - queries_BNWH.shape[2], 0))


def stored(channels_BKC: Tensor) -> Tensor | None:
    """Channels of entries, None where they have all."""
    return channels_BKC if channels_BKC.shape[2] else None
