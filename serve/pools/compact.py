"""Compressed caches: a prompt is read into a state of its own, compressed, and joined to a pool that is only as large
as its sequences need. Beside them the states of sequences whose attention is read or edited."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnzoo.attention.edits import EditRuns
from attnzoo.kvcache import CachePolicy
from attnzoo.models import CompiledDecode, DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from attnzoo.models.embedded import prompt_tensor
from attnzoo.ops.common.step_inputs import StepInputs
from serve.arena import give_back_freed
from serve.pools.parts import Copied, Seen
from serve.request import Alone
from serve.scheduling import Chunk, Release, Reuse

Keep = Callable[[DecoderState], None]
"""Called with a sequence's exact state after a chunk of its prompt."""


class CompactPool:
    """Compressed caches of one policy: one row for each sequence whose prompt has been read.

    compiled: the policy's compiled decode step (`compiled_step`); None: decode without compilation.
    """

    def __init__(self, model: DecoderLM, policy: CachePolicy, compiled: CompiledDecode | None = None) -> None:
        self.model, self.policy = model, policy
        self._compiled = compiled
        self.state: DecoderState | None = None
        self.slots: list[int] = []
        """The slot of each row, ascending: 0, 1, ... between steps. A failed prompt leaves a gap until its release."""
        self.prompts: dict[str, DecoderState] = {}
        """States of prompts that are being read, by request."""
        self._edits: EditRuns | None = None

    @property
    def rows(self) -> int:
        """Number of sequences that decode."""
        return 0 if self.state is None else self.state.batch

    def row_of(self, slot: int) -> int:
        """The row in `state` of the sequence in a slot."""
        return self.slots.index(slot)

    # Other threads call the next two methods while states are added and removed.
    @property
    def nbytes(self) -> int:
        """Allocated bytes of all states in the pool."""
        states = [*list(self.prompts.values()), self.state]
        return sum(state.nbytes() for state in states if state is not None)

    def row_bytes(self, request_id: str) -> int:
        """Allocated bytes of a sequence: of its prompt's state while that is read, afterwards of a row."""
        prompt, state = self.prompts.get(request_id), self.state
        if prompt is not None:
            return prompt.nbytes()
        return 0 if state is None else state.nbytes() // state.batch

    def decode(self, tokens_B1: Tensor, lengths: Sequence[int]) -> Tensor:
        """hidden_BD of the next token of all rows, which have seen as many tokens as lengths says."""
        assert self.state is not None
        if self._compiled is None:
            hidden_BTD, self.state = self._extend(tokens_B1, self.state, lengths)
        else:
            hidden_BTD, self.state = self._compiled(tokens_B1, self.state)
        return hidden_BTD[:, -1]

    def held(self, slot: int) -> int:
        """Bytes of `copy` of the sequence in a slot."""
        assert self.state is not None
        return self.state.nbytes() // self.state.batch

    def copy(self, slot: int) -> DecoderState:
        """The state of the sequence in a slot."""
        assert self.state is not None
        row = self.row_of(slot)
        return self.state.rows(slice(row, row + 1)).clone()

    def put(self, slot: int, tokens: int, state: DecoderState) -> None:
        """Adds a sequence that `copy` has given, behind all others."""
        self._join(slot, state)

    def restore(self, reuse: Reuse, prompt: Sequence[int], copied: Copied) -> None:
        """Continues a sequence whose prompt is read by what `copied` writes into its state."""
        state = self.prompts.pop(reuse.request_id, None)
        if state is None:
            state = self.model.init_state(1, len(prompt), cache=self.policy)
        self.prompts[reuse.request_id] = copied(state, reuse.start, reuse.end)

    def read(self, chunk: Chunk, prompt: Sequence[int], keep: Keep, seen: Seen) -> Tensor:
        """Reads a chunk, and returns hidden_1D of its last token, or no rows if the prompt goes on. If it raises, the
        prompt's state is gone; if `state` is then None, all other rows are lost too."""
        state = self.prompts.pop(chunk.request_id, None)
        if state is None:
            state = self.model.init_state(1, self._room(chunk, prompt), cache=self.policy)
        given = prompt_tensor(self.model, [prompt[chunk.start : chunk.start + chunk.count]])
        hidden_1TD, state = self._extend(given, state, [chunk.start])
        keep(state)
        seen(chunk.request_id, chunk.start, hidden_1TD[0])
        if not chunk.last:
            self.prompts[chunk.request_id] = state
            return hidden_1TD[:0, -1]
        self._join(chunk.slot, self._compressed(state))
        return hidden_1TD[:, -1]

    def _room(self, chunk: Chunk, prompt: Sequence[int]) -> int:
        """Tokens for which a prompt's state has room. A policy that compresses while reading needs less."""
        return chunk.count if self.policy.prefill == "stream" else len(prompt)

    def _extend(self, tokens_BT: Tensor, state: DecoderState, lengths: Sequence[int]) -> tuple[Tensor, DecoderState]:
        step = StepInputs.planned(lengths, tokens_BT.shape[1], device=tokens_BT.device)
        return self.model.extend_hidden(tokens_BT, state, step=step, edits=self._edits)

    def _compressed(self, state: DecoderState) -> DecoderState:
        return self.model.compress(state, joinable=True)

    def _join(self, slot: int, row: DecoderState) -> None:
        assert not self.slots or self.slots[-1] < slot, f"slot {slot} is not behind {self.slots}"
        if self.state is None:
            self.state = row
        else:
            self.state.check_joins(row)
            rows, self.state, slots, self.slots = self.state, None, self.slots, []
            self.state = rows.joined(row)  # consumes `rows`
            self.slots = slots
            give_back_freed()
        self.slots.append(slot)

    def drop(self) -> None:
        """Removes all rows, after a step that failed half way."""
        self.state, self.slots = None, []

    def release(self, request_id: str, release: Release) -> None:
        """Removes a sequence and frees its memory."""
        self.prompts.pop(request_id, None)
        rows = {slot: row for row, slot in enumerate(self.slots)}
        for source, target in release.moves:
            rows.pop(target, None)
            if source in rows:
                rows[target] = rows.pop(source)
        rows.pop(release.freed, None)
        order = [rows[slot] for slot in sorted(rows)]
        if self.state is not None and order != list(range(self.rows)):
            self.state = self.state.keep_rows(order) if order else None
            give_back_freed()
        self.slots = sorted(rows)


class AlonePool(CompactPool):
    """The state of one sequence whose attention is read or edited, under any cache. It goes through the model alone, so
    that other sequences compute what they would compute without it, and fail alone."""

    def __init__(self, model: DecoderLM, alone: Alone) -> None:
        super().__init__(model, alone.cache.build())
        self._alone, self._edits = alone, [alone.run]

    def _room(self, chunk: Chunk, prompt: Sequence[int]) -> int:
        return self._alone.tokens if self._alone.cache.exact else super()._room(chunk, prompt)

    def _compressed(self, state: DecoderState) -> DecoderState:
        return state if self._alone.cache.exact else super()._compressed(state)


@torch.inference_mode()
def compiled_step(model: DecoderLM, policy: CachePolicy, rows: int, tokens: int) -> CompiledDecode:
    """Compiles the decode step of a `CompactPool` for one sequence and, if `rows` is larger, for several. tokens:
    length of the longest sequence. Raises the ValueError of `CompiledDecode`."""
    step = CompiledDecode(model, policy)
    prompt = min(tokens - 1, WARM_UP)
    for count in {1, min(2, rows)}:
        tokens_BT = torch.zeros(count, prompt, dtype=torch.long, device=model.embedding.weight.device)
        _, state = model.extend_hidden(tokens_BT, model.init_state(count, prompt, cache=policy))
        step(tokens_BT[:, :1], model.compress(state, joinable=True))
    return step


WARM_UP = 256
"""Length in tokens of the prompt used for compilation: with a usual budget the cache then keeps several entries."""
