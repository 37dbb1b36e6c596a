"""Which query may look at which key: causality, a prefix, padding, documents, a sliding window and attention sinks."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attnzoo.ops.common.rows import known
from attnzoo.ops.common.step_inputs import Memo

T = TypeVar("T")
MaskField = Literal["causal", "full", "prefix", "starts", "keys", "pairs"]


@dataclass(frozen=True, kw_only=True)
class Mask(Memo):
    """Which keys a query may look at; all softmax operations share it. The query at position i sees the key at j where

        the key exists  and  pairs say so  and  (not causal  or  past  or  i and j are both below prefix)
        with  past = start_i <= j <= i  and  (i - j < window  or  j - start_i < sinks)

    and a query that sees no key gets zeros. What is not given (None) hides nothing.

    Parallel form (no positions): query t is at position t, key s at position s; T and S may differ where the mask is
    not causal.
    `starts_BT` (int64): the first token each token may see: the start of its document in a packed row, the end of the
    padding in a left-padded one (`document_starts`, `padding_starts`). Causal masks only.
    `keys_BS` (bool): which keys exist (`padding_keys`).
    `pairs` (bool): more that must hold for a pair, [B, T, S] or [B, N, T, S] for each query head. Memory is that of
    all pairs.

    Streaming: `query_positions_BT` and `key_positions_BKS` (int64) are logical positions; a key position below 0
    marks an entry that holds nothing; the K axis is 1 when all kv heads hold the same entries. They are not written to
    afterwards: what follows from them is kept.

    Both: `causal`. `window`: only keys at a distance below it are visible, so a window of 1 is the token itself
    (Beltagy et al. 2020, arXiv 2004.05150). `sinks`: the first tokens of the sequence or document stay visible at any
    distance (Xiao et al. 2023, arXiv 2309.17453). `prefix_B` (int64): how many first positions of each row see each
    other whatever their order, such as an image before its text (Raffel et al. 2020, arXiv 1910.10683, figure 4).

    Raises ValueError for a window below 1, sinks without a window, positions of one side only, and fields that do not
    go together.
    """

    causal: bool = True
    window: int | None = None
    sinks: int = 0
    prefix_B: Tensor | None = None
    starts_BT: Tensor | None = None
    keys_BS: Tensor | None = None
    pairs: Tensor | None = None
    query_positions_BT: Tensor | None = None
    key_positions_BKS: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal={self.causal!r} must be True or False")
        check_window(self.window, self.sinks)
        if (self.query_positions_BT is None) != (self.key_positions_BKS is None):
            raise ValueError("query_positions_BT and key_positions_BKS come together: give both or neither")
        if not self.causal:
            self._refuse("causal=False shows keys after the query", "window", "prefix_B", "starts_BT")
        if not self.parallel:
            self._refuse("positions hide keys by position -1", "starts_BT", "keys_BS", "pairs")
        if self.prefix_B is not None:
            self._refuse("prefix_B counts from the first position of a row", "starts_BT")
        for name in ("keys_BS", "pairs"):
            value = getattr(self, name)
            if value is not None and _dtype(value) != torch.bool:
                raise ValueError(f"{name} has dtype {_dtype(value)}; it must be bool, True where a key may be seen")
        for name in ("prefix_B", "starts_BT"):
            value = getattr(self, name)
            if value is not None:
                _check_whole(name, value)

    def _refuse(self, why: str, *names: str) -> None:
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{why}, which {' and '.join(given)} cannot join: leave one of them out")

    @classmethod
    def full(cls, keys_BS: Tensor | None = None, pairs: Tensor | None = None) -> "Mask":
        """Every query sees every key, or every key that exists."""
        return cls(causal=False, keys_BS=keys_BS, pairs=pairs)

    @property
    def uses(self) -> frozenset[MaskField]:
        """Which fields say what is seen: whether it is causal or full, and what else is given."""
        given: dict[MaskField, Tensor | None] = {
            "prefix": self.prefix_B,
            "starts": self.starts_BT,
            "keys": self.keys_BS,
            "pairs": self.pairs,
        }
        return frozenset(
            ("causal" if self.causal else "full", *(name for name, value in given.items() if value is not None))
        )

    @property
    def parallel(self) -> bool:
        """Whether query t is at position t and key s at position s."""
        return self.query_positions_BT is None

    @property
    def plain(self) -> bool:
        """Whether causality of the parallel form is all there is."""
        return self.causal and self.parallel and self.window is None and not self.of_rows and self.pairs is None

    @property
    def of_rows(self) -> bool:
        """Whether every row of the parallel form has a mask of its own, that takes no memory of pairs."""
        return self.starts_BT is not None or self.prefix_B is not None or self.keys_BS is not None

    @property
    def ahead(self) -> bool:
        """Whether a query may see keys after it: relative positions are then asked for distances i - j < 0."""
        return not self.causal or self.prefix_B is not None

    def reach(self, tokens: int, entries: int) -> tuple[int, int]:
        """(largest i - j, largest j - i) of `tokens` queries and `entries` keys of which one may see the other."""
        if self.query_positions_BT is None or self.key_positions_BKS is None:
            latest, behind = entries - 1, tokens - 1
        else:
            behind = int(self.query_positions_BT.max())
            latest = int(self.key_positions_BKS.max()) if self.ahead and entries else 0
        if self.causal:
            latest = 0 if self.prefix_B is None else min(latest, int(self.prefix_B.max()) - 1)
        return behind, max(latest, 0)

    def positions(self, tokens: int, entries: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(query_positions_BT, key_positions_BKS); of the parallel form 0..T-1 as [1, T] and 0..S-1 as [1, 1, S]."""
        if self.query_positions_BT is None or self.key_positions_BKS is None:
            keys_S = torch.arange(entries, device=device)
            return torch.arange(tokens, device=device)[None], keys_S[None, None]
        return self.query_positions_BT, self.key_positions_BKS

    def visible(self, tokens: int, entries: int, device: torch.device) -> Tensor:
        """visible_BKTS: True where the query may look. B may be 1, and K is 1, the kv heads, or with pairs the query
        heads."""
        return _visible(self, tokens, entries, device).expand(-1, -1, tokens, -1)

    def opened(self, tokens: int, entries: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(visible_BKTS, empty_BKT1): as `visible`, but that queries which see nothing see all, so that no softmax
        meets a row of nothing; `empty` says which: their outputs are to be replaced by zeros. None: there are none, as
        far as can be told without waiting. T may be 1, too, where all see the same. That of one query is
        computed once for all layers that share the mask."""
        if tokens > 1:  # large to keep
            return _opened(self, tokens, entries, device)
        return self.once(_opened, tokens, entries, device)

    def bias(self, tokens: int, entries: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """`opened` as (bias_BKTS, empty_BKT1) to be added to scores: 0 where the query may look, -inf elsewhere. It is
        computed once for all layers that share the mask."""
        return self.once(_bias, tokens, entries, device, dtype)

    def once(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """As `Memo`. A mask without positions is not bound to a step, and may live for long: it keeps nothing."""
        return make(self, *arguments) if self.parallel else super().once(make, *arguments)

    def of_block(self, rows: slice, queries: range, keys: range, device: torch.device) -> Tensor:
        """`visible` of some rows of the parallel form without pairs, for some queries and keys: [B, R, W], of which B
        and R may be 1."""
        block, span = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        return sees(
            torch.arange(queries.start, queries.stop, device=device)[None, :, None],
            torch.arange(keys.start, keys.stop, device=device)[None, None],
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            prefix=None if self.prefix_B is None else self.prefix_B[rows, None, None],
            starts=None if self.starts_BT is None else self.starts_BT[rows, block, None],
            exists=None if self.keys_BS is None else self.keys_BS[rows, None, span],
        )


def sees(
    queries: Tensor,
    keys: Tensor,
    *,
    causal: bool,
    window: int | None,
    sinks: int,
    prefix: Tensor | None,
    starts: Tensor | None,
    exists: Tensor | None,
) -> Tensor:
    """The formula of `Mask`, without pairs, for positions and fields that broadcast against each other."""
    seen = keys >= 0 if exists is None else exists & (keys >= 0)
    if not causal:
        return seen
    since = keys if starts is None else keys - starts
    past = keys <= queries if starts is None else (since >= 0) & (keys <= queries)
    if window is not None:
        past = past & ((queries - keys < window) | (since < sinks))
    if prefix is not None:
        past = past | ((queries < prefix) & (keys < prefix))
    return seen & past


def _visible(mask: Mask, tokens: int, entries: int, device: torch.device) -> Tensor:
    queries_BT, keys_BKS = mask.positions(tokens, entries, device)
    prefix_B, starts_BT, keys_BS, pairs = mask.prefix_B, mask.starts_BT, mask.keys_BS, mask.pairs
    seen_BKTS = sees(
        queries_BT[:, None, :, None],
        keys_BKS[:, :, None, :],
        causal=mask.causal,
        window=mask.window,
        sinks=mask.sinks,
        prefix=None if prefix_B is None else prefix_B[:, None, None, None],
        starts=None if starts_BT is None else starts_BT[:, None, :, None],
        exists=None if keys_BS is None else keys_BS[:, None, None],
    )
    if pairs is not None:
        seen_BKTS = seen_BKTS & (pairs if pairs.dim() == 4 else pairs[:, None])
    return seen_BKTS


def _opened(mask: Mask, tokens: int, entries: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    seen_BKTS = _visible(mask, tokens, entries, device)
    some_BKT1 = seen_BKTS.any(-1, keepdim=True)
    if known(some_BKT1):
        return seen_BKTS, None
    empty_BKT1 = ~some_BKT1
    return seen_BKTS | empty_BKT1, empty_BKT1


def _bias(
    mask: Mask, tokens: int, entries: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    seen_BKTS, empty_BKT1 = _opened(mask, tokens, entries, device)
    zeros = torch.zeros(seen_BKTS.shape, dtype=dtype, device=device)
    return zeros.masked_fill_(~seen_BKTS, float("-inf")), empty_BKT1


def _dtype(value: Any) -> Any:
    """The dtype of a tensor; the name of what is none."""
    return value.dtype if isinstance(value, Tensor) else f"of a {type(value).__name__}, and is no tensor"


def _check_whole(name: str, value: Any) -> None:
    if _dtype(value) not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {_dtype(value)}; it must be int64, a number of tokens")


def check_window(window: int | None, sinks: int) -> None:
    """Raises ValueError for a window below 1, a negative number of sinks, or sinks without a window."""
    for name, value in (("window", window), ("sinks", sinks)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name}={value!r} must be a whole number of tokens")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the token itself), or None for no window")
    if sinks < 0:
        raise ValueError(f"sinks={sinks} must be at least 0")
    if sinks and window is None:
        raise ValueError(f"sinks={sinks} without a window: all keys are visible already; set window or sinks=0")


CAUSAL = Mask()
"""Causality of the parallel form, nothing else."""


def document_starts(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """starts_BT of rows packed with documents.

    `cu_seqlens` (integers, [documents + 1]) are the cumulative lengths over the B * T tokens of all rows, from 0 to
    B * T. A document that crosses the end of a row starts anew in the next one. Raises ValueError when they do not
    rise from 0 to B * T.
    """
    _check_whole("cu_seqlens", cu_seqlens)
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
    _check_whole("tokens_BT", tokens_BT)
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return torch.where(tokens_BT == marker, index_T, 0).cummax(dim=1).values


def padding_starts(lengths_B: Tensor, tokens: int, side: Literal["left", "right"]) -> Tensor:
    """starts_BT of padded rows with `lengths_B` real tokens each; a padding token sees itself alone.

    Padding must hold finite numbers (embeddings do). Raises ValueError for lengths outside 0..tokens or another side.
    """
    _check_lengths(lengths_B, tokens, side)
    index_T = torch.arange(tokens, device=lengths_B.device)
    if side == "right":
        return torch.where(index_T < lengths_B[:, None], 0, index_T)
    padding_B1 = tokens - lengths_B[:, None]
    return torch.where(index_T >= padding_B1, padding_B1, index_T)


def padding_keys(lengths_B: Tensor, tokens: int, side: Literal["left", "right"]) -> Tensor:
    """keys_BS of padded rows with `lengths_B` real tokens each. Raises ValueError as `padding_starts`."""
    _check_lengths(lengths_B, tokens, side)
    index_S = torch.arange(tokens, device=lengths_B.device)
    return (index_S if side == "right" else tokens - 1 - index_S) < lengths_B[:, None]


def _check_lengths(lengths_B: Tensor, tokens: int, side: str) -> None:
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is not 'left' or 'right'")
    _check_whole("lengths_B", lengths_B)
    if bool(((lengths_B < 0) | (lengths_B > tokens)).any()):
        raise ValueError(f"lengths {lengths_B.tolist()} must lie between 0 and the {tokens} tokens of a row")


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


def check_mask(mask: Mask, q_BNTH: Tensor, k_BKSH: Tensor) -> None:
    """Raises ValueError when the mask's tensors do not fit q and k."""
    batch, heads, tokens, _ = q_BNTH.shape
    entries = k_BKSH.shape[2]
    if mask.causal and mask.parallel and tokens != entries:
        raise ValueError(
            f"{tokens} queries and {entries} keys: a causal mask of the parallel form needs as many; give "
            "query_positions_BT and key_positions_BKS, or a mask with causal=False"
        )
    fitting: dict[str, list[tuple[int, ...]]] = {
        "prefix_B": [(batch,)],
        "starts_BT": [(batch, tokens)],
        "keys_BS": [(batch, entries)],
        "pairs": [(batch, tokens, entries), (batch, heads, tokens, entries)],
    }
    for name, shapes in fitting.items():
        value = getattr(mask, name)
        if value is not None and tuple(value.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {' or '.join(map(str, shapes))}")
    for name, least in (("starts_BT", mask.starts_BT), ("prefix_B", mask.prefix_B)):
        if least is not None and known((least < 0).any()):
            raise ValueError(f"{name} is {int(least.min())} somewhere; it counts tokens, from 0 on")


def check_future_rows(mask: Mask, future_rows: int, rows: int) -> None:
    """Raises ValueError when relative terms have no rows for keys after the query and the mask shows such keys, or when
    not one of the rows is left for keys before it."""
    if not 0 <= future_rows < rows:
        raise ValueError(f"future_rows={future_rows} must lie between 0 and {rows - 1}: there are {rows} rows in all")
    if mask.ahead and not future_rows:
        shown = "causal=False" if not mask.causal else "prefix_B"
        raise ValueError(
            f"the mask shows keys after the query ({shown}), and with future_rows=0 no distance i-j < 0 has a row: "
            "give rows for them, and say how many by future_rows"
        )
