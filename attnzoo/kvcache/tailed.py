"""Caches that compress the prompt once and keep later tokens whole: fixed compressed entries and a growing tail."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.kvcache import compressed as cc
from attnzoo.kvcache.base import CachedLayer, NewTokens, ScoreFunction
from attnzoo.kvcache.channels import condensed
from attnzoo.kvcache.compressed import CompressedState, CompressingCache
from attnzoo.kvcache.full import FullCacheState
from attnzoo.ops.common.step_inputs import token_of


class TailedCache(CompressingCache):
    """Base of these policies. Subclasses define `shrink` and `lossless`; `config` has `window` and `prefill`."""

    observes = False
    """Whether the last `window` queries of the prompt are needed: the state then has queries_BNWH."""
    follows = False
    """Whether the last `window` queries are needed after the prompt too; they are then stored `condensed`."""
    one_by_one = False
    """Whether generated tokens must be added one at a time, because any of them may start a pruning."""

    @property
    def resumes(self) -> int:
        return int(self.config.window) if self.observes and not self.lossless else 0

    @abstractmethod
    def shrink(self, layer: CachedLayer) -> CompressedState:
        """The layer's state with all but the newest `window` tokens compressed."""

    def read(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, CompressedState]:
        if new.tokens > 1 and self.one_by_one and not state.reading:
            return self._one_by_one(state, score_function, new)
        # Before the queries are updated: a pruning is scored by the queries before this chunk.
        state = self.before_append(state, score_function, new.step.positions_BT[:, 0])
        if self.observes and not self.lossless and (self.follows or state.reading):
            q_BNTH = new.q_BNTH if state.reading else condensed(new.q_BNTH, new.k_BKTH.shape[1])
            seen = cc.last_queries(state.queries_BNWH, q_BNTH, new, self.config.window)
            state = replace(state, queries_BNWH=seen)
        state, view = cc.append(state, new)
        return cc.attend(state, score_function, new.q_BNTH, view, new.step.positions_BT), state

    def _one_by_one(self, state: Any, score_function: ScoreFunction, new: NewTokens) -> tuple[Tensor, CompressedState]:
        outputs = []
        for t in range(new.tokens):
            q, k, v = (x[:, :, t : t + 1] for x in (new.q_BNTH, new.k_BKTH, new.v_BKTH))
            out, state = self.read(state, score_function, NewTokens(q, k, v, new.step.once(token_of, t)))
            outputs.append(out)
        return torch.cat(outputs, dim=2), state

    def before_append(self, state: Any, score_function: ScoreFunction, lengths_B: Tensor) -> Any:
        """The state, of lengths_B tokens, to append a chunk to; policies that prune the tail do it here."""
        return state

    def compress(self, layers: Sequence[CachedLayer], final: bool) -> list[Any]:
        return [self._compressed(layer, final) for layer in layers]

    def _compressed(self, layer: CachedLayer, final: bool) -> Any:
        state: Any = layer.state if self.lossless else self.shrink(layer)
        if not final:
            return state
        if self.observes and not self.lossless:
            # Padded to the window's width, so that sequences can be joined.
            seen = cc.front_padded(state.queries_BNWH, self.config.window)
            kept = condensed(seen, state.heads[0]) if self.follows else seen[:, :0].clone()
            state = replace(state, queries_BNWH=kept)
        return replace(state, ended_B=torch.ones_like(state.ended_B))


def cut_tail(state: CompressedState, first_B: Tensor, lengths_B: Tensor) -> FullCacheState:
    """The tail from position first_B on, in new memory of whole pages."""
    tail = state.tail
    slots = cc.pages(max(1, int((lengths_B - first_B).max())))
    steps_S = torch.arange(slots, device=lengths_B.device)
    index_BS = (first_B - state.starts_B)[:, None] + steps_S
    gone_BS = first_B[:, None] + steps_S >= lengths_B[:, None]
    index_BS = index_BS.clamp(max=tail.keys_BKSH.shape[2] - 1)

    def cut(x_BKSH: Tensor) -> Tensor:
        rows = x_BKSH.gather(2, index_BS[:, None, :, None].expand(-1, x_BKSH.shape[1], -1, x_BKSH.shape[3]))
        return rows.masked_fill_(gone_BS[:, None, :, None], 0.0)

    return FullCacheState(cut(tail.keys_BKSH), cut(tail.values_BKSH))
