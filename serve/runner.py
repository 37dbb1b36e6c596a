"""The only place that touches the device: one batched state, read and written by rows."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.models import CompiledDecode, DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from serve.cache_manager import Release
from serve.request import Request
from serve.scheduler import Chunk, Plan


class Runner:
    """Runs plans on a pool of `max_num_seqs` rows with room for `max_model_len` tokens each.

    `compile_decode`: compiles decode steps here and now. Raises ValueError for a model whose steps cannot be compiled,
    and without a C++ compiler.
    """

    def __init__(self, model: DecoderLM, max_num_seqs: int, max_model_len: int, compile_decode: bool = False) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        self.pool = model.init_state(max_num_seqs, max_model_len)
        self.pool_bytes = self.pool.nbytes()
        self.kv_bytes = lru_cache(maxsize=4096)(self._kv_bytes)
        # The pool's tensors stay where they are, so views of the same rows are made once.
        self._views: dict[tuple[int, int], DecoderState] = {}
        self._compiled = CompiledDecode(model) if compile_decode else None
        if self._compiled is not None:
            self._warm_up(self._compiled, max_num_seqs)

    @torch.inference_mode()
    def _warm_up(self, step: CompiledDecode, max_num_seqs: int) -> None:
        """Compiles for one sequence and for several, so that no request waits for it."""
        for count in {1, min(2, max_num_seqs)}:
            step(self._tensor([[0]] * count), self._rows(slice(0, count)))
            self.pool.reset(slice(0, count))

    def _kv_bytes(self, context: int) -> int:
        """Bytes of the state that a sequence of `context` tokens fills, without what is only reserved."""
        return self.model.cost(batch=1, tokens=1, context=context).state_bytes

    @torch.inference_mode()
    def run(self, plan: Plan, requests: Mapping[str, Request]) -> Tensor:
        """logits_RV of the sequences in `plan.sampled`, in that order."""
        parts = []
        if plan.decode:
            tokens_B1 = self._tensor([[requests[request_id].generated[-1]] for request_id in plan.decode])
            hidden_BTD = self._decode(tokens_B1)
            parts.append(hidden_BTD[:, -1])
        for chunks in _groups(plan.prefill):
            parts.append(self._prefill(chunks, requests))
        hidden_RD = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.model.logits(hidden_RD)

    def _prefill(self, chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> Tensor:
        """hidden_RD behind the prompts that end in these chunks of neighbouring slots."""
        width = max(chunk.count for chunk in chunks)
        rows = [requests[c.request_id].prompt[c.start : c.start + c.count] for c in chunks]
        tokens_BT = self._tensor([row + [0] * (width - len(row)) for row in rows])
        counts = [chunk.count for chunk in chunks]
        counts_B = self._tensor(counts) if min(counts) < width else None
        hidden_BTD = self._extend(tokens_BT, chunks[0].slot, counts_B)
        ended = [row for row, chunk in enumerate(chunks) if chunk.last]
        return hidden_BTD[ended, [counts[row] - 1 for row in ended]]

    def _decode(self, tokens_B1: Tensor) -> Tensor:
        if self._compiled is None:
            return self._extend(tokens_B1, 0, None)
        return self._compiled(tokens_B1, self._rows(slice(0, len(tokens_B1))))

    def _extend(self, tokens_BT: Tensor, first_slot: int, counts_B: Tensor | None) -> Tensor:
        rows = self._rows(slice(first_slot, first_slot + len(tokens_BT)))
        hidden_BTD, state = self.model.extend_hidden(tokens_BT, rows, counts_B)
        rows.fill(state)
        return hidden_BTD

    def _rows(self, rows: slice) -> DecoderState:
        key = (rows.start, rows.stop)
        if key not in self._views:
            self._views[key] = self.pool.rows(rows)
        return self._views[key]

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def release(self, release: Release) -> None:
        """Moves rows and empties the freed one: nothing of a sequence stays behind for the next."""
        for source, target in release.moves:
            self.pool.store(slice(target, target + 1), self.pool.rows(slice(source, source + 1)))
        self.pool.reset(slice(release.freed, release.freed + 1))


def _groups(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks that go through the model together: neighbours, as long as padding at most doubles the work."""
    groups: list[list[Chunk]] = []
    for chunk in chunks:
        if groups and _padded([*groups[-1], chunk]) <= 2 * sum(c.count for c in [*groups[-1], chunk]):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _padded(chunks: Sequence[Chunk]) -> int:
    return len(chunks) * max(chunk.count for chunk in chunks)
