"""Which query may look at which key: causality, documents, padding, a sliding window and attention sinks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.ops.common.recent import recent


@dataclass(frozen=True, kw_only=True)
class CausalMask:
    """Which keys a query may look at; all softmax operations share it.

    Parallel form (no positions): queries and keys are the same T tokens, token t at index t. `starts_BT` (int64) is
    the index of the first token each token may see: the start of its document in a packed row, the end of the
    padding in a left-padded one (`document_starts`, `padding_starts`); None means 0.

    Streaming: `query_positions_BT` and `key_positions_BKS` (int64) are logical positions; a key position below 0
    marks an entry that holds nothing; the K axis is 1 when all kv heads hold the same entries.

    `window`: only keys at a distance below it are visible, so a window of 1 is the token itself (Beltagy et al. 2020,
    arXiv 2004.05150). `sinks`: the first tokens of the sequence or document stay visible at any distance (Xiao et
    al. 2023, arXiv 2309.17453). Raises ValueError for a window below 1, sinks without a window, positions of one
    side only, or starts together with positions.
    """

    window: int | None = None
    sinks: int = 0
    starts_BT: Tensor | None = None
    query_positions_BT: Tensor | None = None
    key_positions_BKS: Tensor | None = None

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks)
        if (self.query_positions_BT is None) != (self.key_positions_BKS is None):
            raise ValueError("query_positions_BT and key_positions_BKS come together: give both or neither")
        if self.starts_BT is not None and self.query_positions_BT is not None:
            raise ValueError("starts_BT belongs to the parallel form; with positions, hide keys by position -1")

    @property
    def parallel(self) -> bool:
        """Whether queries and keys are the same tokens, in order."""
        return self.query_positions_BT is None

    @property
    def plain(self) -> bool:
        """Whether causality of the parallel form is all there is."""
        return self.parallel and self.window is None and self.starts_BT is None

    def positions(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(query_positions_BT, key_positions_BKS); of the parallel form 0..T-1 as [1, T] and [1, 1, T]."""
        if self.query_positions_BT is None or self.key_positions_BKS is None:
            steps = torch.arange(tokens, device=device)
            return steps[None], steps[None, None]
        return self.query_positions_BT, self.key_positions_BKS

    def visible(self, tokens: int, device: torch.device) -> Tensor:
        """visible_BKTS: True where the query may look; B and K may be 1."""
        return _visible(*self.positions(tokens, device), self.starts_BT, self.window, self.sinks)

    def bias(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """bias_BKTS to be added to scores: 0 where the query may look, -inf elsewhere; B and K may be 1. Layers that
        give the same positions share it."""
        return _bias(*self.positions(tokens, device), self.starts_BT, self.window, self.sinks, dtype)


def _visible(queries_BT: Tensor, keys_BKS: Tensor, starts_BT: Tensor | None, window: int | None, sinks: int) -> Tensor:
    queries_B1T1, keys_BK1S = queries_BT[:, None, :, None], keys_BKS[:, :, None, :]
    starts_B1T1 = 0 if starts_BT is None else starts_BT[:, None, :, None]
    seen = (keys_BK1S >= starts_B1T1) & (keys_BK1S <= queries_B1T1)
    if window is not None:
        seen = seen & ((queries_B1T1 - keys_BK1S < window) | (keys_BK1S - starts_B1T1 < sinks))
    return seen


@recent
def _bias(
    queries_BT: Tensor,
    keys_BKS: Tensor,
    starts_BT: Tensor | None,
    window: int | None,
    sinks: int,
    dtype: torch.dtype,
) -> Tensor:
    seen = _visible(queries_BT, keys_BKS, starts_BT, window, sinks)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def check_window(window: int | None, sinks: int) -> None:
    """Raises ValueError for a window below 1, a negative number of sinks, or sinks without a window."""
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the token itself), or None for no window")
    if sinks < 0:
        raise ValueError(f"sinks={sinks} must be at least 0")
    if sinks and window is None:
        raise ValueError(f"sinks={sinks} without a window: all keys are visible already; set window or sinks=0")


PLAIN = CausalMask()
"""Causality of the parallel form, nothing else."""


def document_starts(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """starts_BT of rows packed with documents.

    `cu_seqlens` (integers, [documents + 1]) are the cumulative lengths over the B * T tokens of all rows, from 0 to
    B * T. A document that crosses the end of a row starts anew in the next one. Raises ValueError when they do not
    rise from 0 to B * T.
    """
    edges = cu_seqlens.to(torch.int64)
    total = batch * tokens
    if edges.dim() != 1 or len(edges) < 2 or edges[0] != 0 or edges[-1] != total or bool((edges.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens={edges.tolist()} must rise from 0 to batch * tokens = {batch} * {tokens} = {total}"
        )
    index_L = torch.arange(total, device=edges.device)
    starts_BT = edges[torch.searchsorted(edges, index_L, right=True) - 1].view(batch, tokens)
    row_B1 = torch.arange(batch, device=edges.device)[:, None] * tokens
    return (starts_BT - row_B1).clamp(min=0)


def marked_starts(tokens_BT: Tensor, marker: int) -> Tensor:
    """starts_BT of rows of tokens in which every document begins with the token `marker`; what stands before the first
    one in a row is a document of its own."""
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return torch.where(tokens_BT == marker, index_T, 0).cummax(dim=1).values


def padding_starts(lengths_B: Tensor, tokens: int, side: Literal["left", "right"]) -> Tensor:
    """starts_BT of padded rows with `lengths_B` real tokens each; a padding token sees itself alone.

    Padding must hold finite numbers (embeddings do). Raises ValueError for lengths outside 0..tokens or another side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is not 'left' or 'right'")
    if bool(((lengths_B < 0) | (lengths_B > tokens)).any()):
        raise ValueError(f"lengths {lengths_B.tolist()} must lie between 0 and the {tokens} tokens of a row")
    index_T = torch.arange(tokens, device=lengths_B.device)
    if side == "right":
        return torch.where(index_T < lengths_B[:, None], 0, index_T)
    padding_B1 = tokens - lengths_B[:, None]
    return torch.where(index_T >= padding_B1, padding_B1, index_T)


def check_heads(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> None:
    """Raises ValueError when batch, head or length axes of q, k and v do not fit together."""
    q, k, v = tuple(q_BNTH.shape), tuple(k_BKSH.shape), tuple(v_BKSH.shape)
    if len(q) != 4 or len(k) != 4 or len(v) != 4:
        raise ValueError(f"q, k and v need 4 axes [batch, heads, time, head_dim]; got q={q}, k={k}, v={v}")
    if q[0] != k[0] or k[:3] != v[:3] or q[3] != k[3] or q[1] % k[1]:
        raise ValueError(
            f"q={q}, k={k}, v={v} do not fit: batch must agree, k and v must agree in all but the last axis, "
            "q and k in the last, and query heads must be a multiple of kv heads"
        )


def check_mask(mask: CausalMask, q_BNTH: Tensor, k_BKSH: Tensor) -> None:
    """Raises ValueError when the mask's tensors do not fit q and k."""
    batch, _, tokens, _ = q_BNTH.shape
    if mask.parallel and tokens != k_BKSH.shape[2]:
        raise ValueError(
            f"{tokens} queries and {k_BKSH.shape[2]} keys: the parallel form needs as many; "
            "give query_positions_BT and key_positions_BKS"
        )
    if mask.starts_BT is not None and mask.starts_BT.shape != (batch, tokens):
        raise ValueError(f"starts_BT has shape {tuple(mask.starts_BT.shape)}; it must be {(batch, tokens)}")
