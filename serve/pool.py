"""Holds states on the device. Sequences that decode together are the rows of one batched state.

`SlotPool` holds full caches in rows for the longest context, of which memory is taken as they fill (`serve.arena`);
prompts are read directly into their rows.
`CompactPool` holds compressed caches: a prompt is read into a state of its own, compressed, and joined to the pool,
which is only as large as its sequences need. `AlonePool` holds one sequence whose attention is read or edited.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnzoo.attention.edits import EditRuns
from attnzoo.kvcache import CachePolicy
from attnzoo.models import CompiledDecode, DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from attnzoo.models.embedded import prompt_tensor
from attnzoo.ops.common.step_inputs import StepInputs
from serve.arena import ElasticState, give_back_freed
from serve.faults import logger
from serve.request import Alone
from serve.scheduling import Chunk, Release, Reuse

Prompts = Sequence[tuple[Chunk, Sequence[int]]]
"""Chunks in neighbouring slots, each with its whole prompt: token ids, or an `EmbeddedPrompt`."""


Copied = Callable[[DecoderState, int, int], DecoderState]
"""The state of one sequence of so many tokens, continued to so many, in place where its tensors are as large."""
Keep = Callable[[DecoderState], None]
"""Called with a sequence's exact state after a chunk of its prompt."""


class HalfWrittenError(RuntimeError):
    """Only some layers of a state have stored a step, so that the step cannot be repeated."""


class SlotPool:
    """Full caches of `rows` sequences with room for `tokens` tokens each.

    compile_decode: compile decode steps in the constructor. Raises ValueError if the model's steps cannot be compiled,
    there is no C++ compiler, or the memory of the rows, where it is taken at once, is more than there is.
    """

    def __init__(self, model: DecoderLM, rows: int, tokens: int, compile_decode: bool = False) -> None:
        self.model = model
        self._elastic = elastic_state(model, rows, tokens)
        self.state = whole_state(model, rows, tokens) if self._elastic is None else self._elastic.state
        self.lengths = [0] * rows
        """Tokens in each slot."""
        # The tensors never move, so that each view of rows is made only once.
        self._views: dict[tuple[int, int], DecoderState] = {}
        self._compiled = CompiledDecode(model) if compile_decode else None
        if self._compiled is not None:
            self._warm_up(self._compiled, rows)

    def _warm_up(self, step: CompiledDecode, rows: int) -> None:
        """Compiles for one sequence and for several, so that no request waits for compilation."""
        for count in {1, min(2, rows)}:
            step(_tensor(self.model, [[0]] * count), self._rows(slice(0, count)))
            for slot in range(count):
                self._empty(slot)

    # Another thread calls it.
    @property
    def nbytes(self) -> int:
        """Bytes of memory that are taken."""
        if self._elastic is None:
            return self.state.nbytes()
        return self._elastic.always + sum(self._elastic.nbytes(tokens) for tokens in list(self.lengths))

    def row_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of so many tokens takes; 0 where rows take all their memory from the start."""
        return 0 if self._elastic is None else self._elastic.nbytes(tokens)

    @property
    def repeats(self) -> bool:
        """Whether a failed decode step may be repeated: it has then written only the new token's keys and values, which
        a repetition overwrites. A compiled step advances its token counts layer by layer and cannot be repeated."""
        return self._compiled is None

    def decode(self, tokens_B1: Tensor, lengths: Sequence[int]) -> Tensor:
        """hidden_BD of the next token of the first B slots, which have as many tokens as lengths says."""
        if self._compiled is None:
            return self._extend(tokens_B1, 0, lengths)[:, -1]
        hidden_BTD, _ = self._compiled(tokens_B1, self._rows(slice(0, len(tokens_B1))))
        self._note(0, [length + 1 for length in lengths])
        return hidden_BTD[:, -1]

    def decode_one(self, token: int, slot: int, length: int) -> Tensor:
        """hidden_1D of the next token of one slot; repeats a failed `decode` if `repeats` is True."""
        return self._extend(_tensor(self.model, [[token]]), slot, [length])[:, -1]

    def prefill(self, prompts: Prompts) -> Tensor:
        """Reads chunks, and returns hidden_RD of the last tokens of the R prompts that end in them."""
        chunks = [chunk for chunk, _ in prompts]
        counts = [chunk.count for chunk in chunks]
        rows = [prompt[c.start : c.start + c.count] for c, prompt in prompts]
        lengths = [chunk.start for chunk in chunks]
        hidden_BTD = self._extend(prompt_tensor(self.model, rows), chunks[0].slot, lengths, counts)
        ended = [row for row, chunk in enumerate(chunks) if chunk.last]
        return hidden_BTD[ended, [counts[row] - 1 for row in ended]]

    def row(self, slot: int) -> DecoderState:
        """A view of the state of the sequence in a slot."""
        return self._rows(slice(slot, slot + 1))

    def held(self, slot: int) -> int:
        """Bytes of `copy` of the sequence in a slot."""
        return self.row(slot).cut(self.lengths[slot]).nbytes()

    def copy(self, slot: int) -> DecoderState:
        """The state of the sequence in a slot, as large as its tokens need."""
        return self.row(slot).cut(self.lengths[slot]).clone()

    def put(self, slot: int, tokens: int, state: DecoderState) -> None:
        """Puts a sequence of so many tokens, which `copy` has given, into an empty slot."""
        self.row(slot).cut(tokens).fill(state)
        self.lengths[slot] = tokens

    def restore(self, reuse: Reuse, copied: Copied) -> None:
        """Continues the sequence in a slot by what `copied` writes into its state."""
        copied(self.row(reuse.slot), reuse.start, reuse.end)
        self.lengths[reuse.slot] = reuse.end

    def read_again(self, chunk: Chunk, prompt: Sequence[int]) -> Tensor:
        """Repeats `prefill` of one prompt, from its beginning, after a failure left its row in an unknown state."""
        self._empty(chunk.slot)
        end = chunk.start + chunk.count
        for first in range(0, end, chunk.count):
            tokens = prompt[first : min(first + chunk.count, end)]
            hidden_1TD = self._extend(prompt_tensor(self.model, [tokens]), chunk.slot, [first])
        return hidden_1TD[:, -1] if chunk.last else hidden_1TD[:0, -1]

    def exchange(self, slots: tuple[int, int]) -> None:
        """Exchanges the sequences in two slots."""
        most = max(self.lengths[slot] for slot in slots)
        first, second = (self.state.rows(slice(slot, slot + 1)).cut(max(most, 1)) for slot in slots)
        kept = first.clone()
        first.fill(second)
        second.fill(kept)
        self.lengths[slots[0]], self.lengths[slots[1]] = self.lengths[slots[1]], self.lengths[slots[0]]
        if self._elastic is not None:
            for slot in slots:
                self._elastic.release(slot, self.lengths[slot])

    def clear(self) -> None:
        """Empties all rows."""
        for slot in range(len(self.lengths)):
            self._empty(slot)

    def _extend(
        self, tokens_BT: Tensor, first_slot: int, lengths: Sequence[int], counts: Sequence[int] | None = None
    ) -> Tensor:
        rows = self._rows(slice(first_slot, first_slot + len(tokens_BT)))
        step = StepInputs.planned(lengths, tokens_BT.shape[1], counts, tokens_BT.device)
        hidden_BTD, state = self.model.extend_hidden(tokens_BT, rows, step=step)
        try:
            rows.fill(state)
        except Exception as failure:
            raise HalfWrittenError("a state could not be written back") from failure
        given = counts or [tokens_BT.shape[1]] * len(tokens_BT)
        self._note(first_slot, [length + count for length, count in zip(lengths, given, strict=True)])
        return hidden_BTD

    def _note(self, first_slot: int, lengths: Sequence[int]) -> None:
        self.lengths[first_slot : first_slot + len(lengths)] = lengths

    def _rows(self, rows: slice) -> DecoderState:
        key = (rows.start, rows.stop)
        if key not in self._views:
            self._views[key] = self.state.rows(rows)
        return self._views[key]

    def _empty(self, slot: int) -> None:
        """Empties a row, so that no data of its sequence remains."""
        self.lengths[slot] = 0
        if self._elastic is None:
            self.state.reset(slice(slot, slot + 1))
        else:
            self._elastic.release(slot)

    def release(self, request_id: str, release: Release) -> None:
        """Moves rows, and empties the freed one."""
        for source, target in release.moves:
            self._empty(target)
            tokens = self.lengths[source]
            self.state.rows(slice(target, target + 1)).cut(tokens).fill(
                self.state.rows(slice(source, source + 1)).cut(tokens)
            )
            self.lengths[target] = tokens
        self._empty(release.freed)


def elastic_state(model: DecoderLM, rows: int, tokens: int) -> ElasticState | None:
    """`ElasticState` of a model on a CPU; None, with a line in the log, where the system refuses it."""
    if model.embedding.weight.device.type != "cpu":
        return None
    try:
        return ElasticState(model, rows, tokens)
    except OSError as refusal:
        logger.warning("each of %d sequences takes the memory of %d tokens from the start: %s", rows, tokens, refusal)
        return None


def whole_state(model: DecoderLM, rows: int, tokens: int) -> DecoderState:
    """A state that takes all its memory at once. Raises ValueError where there is less."""
    try:
        return model.init_state(rows, tokens)
    except ValueError as error:
        raise ValueError(f"max_num_seqs={rows} sequences of max_model_len={tokens} tokens: {error}") from None


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

    def read(self, chunk: Chunk, prompt: Sequence[int], keep: Keep) -> Tensor:
        """Reads a chunk, and returns hidden_1D of its last token, or no rows if the prompt goes on. If it raises, the
        prompt's state is gone; if `state` is then None, all other rows are lost too."""
        state = self.prompts.pop(chunk.request_id, None)
        if state is None:
            state = self.model.init_state(1, self._room(chunk, prompt), cache=self.policy)
        given = prompt_tensor(self.model, [prompt[chunk.start : chunk.start + chunk.count]])
        hidden_1TD, state = self._extend(given, state, [chunk.start])
        keep(state)
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
        tokens_BT = _tensor(model, [[0] * prompt] * count)
        _, state = model.extend_hidden(tokens_BT, model.init_state(count, prompt, cache=policy))
        step(tokens_BT[:, :1], model.compress(state, joinable=True))
    return step


WARM_UP = 256
"""Length in tokens of the prompt used for compilation: with a usual budget the cache then keeps several entries."""


def _tensor(model: DecoderLM, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=model.embedding.weight.device)
