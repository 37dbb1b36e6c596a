"""Full caches in rows for the longest context, of which memory is taken as they fill (`serve.arena`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.models import CompiledDecode, DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from attnzoo.models.embedded import prompt_tensor
from attnzoo.ops.common.step_inputs import StepInputs
from serve.arena import ElasticState
from serve.faults import logger
from serve.pools.parts import Copied, Seen, others
from serve.scheduling import Chunk, Release, Reuse

Prompts = Sequence[tuple[Chunk, Sequence[int]]]
"""Chunks in neighbouring slots, each with its whole prompt: token ids, or an `EmbeddedPrompt`."""


class HalfWrittenError(RuntimeError):
    """Only some layers of a state have stored a step, so that the step cannot be repeated."""


@dataclass(frozen=True)
class Verified:
    """Tokens that were read though not all of them may stay: with the lengths of their rows before, how many each has,
    and what was there that their reading has changed for good."""

    tokens_BT: Tensor
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    lasting: Mapping[str, Tensor]


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

    def verify(self, tokens_BT: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Verified]:
        """hidden_BTD of several next tokens of the first B slots, of which `keep` must be told how many stay. The rest
        of a row of tokens is padding."""
        read = Verified(tokens_BT, tuple(lengths), tuple(counts), self._lasting(len(tokens_BT)))
        try:
            return self._extend(tokens_BT, 0, lengths, counts), read
        except Exception:
            self.put_back(read)
            raise

    def put_back(self, read: Verified) -> None:
        """Undoes `verify`. Keys and values in slots behind a row's tokens count for nothing, and stay."""
        rows = others(self._rows(slice(0, len(read.lengths))))
        for name, x in read.lasting.items():
            rows[name].copy_(x)
        self._note(0, read.lengths)

    def keep(self, read: Verified, kept: Sequence[int]) -> None:
        """Of the tokens that `verify` has read, the first `kept` of each row stay, which are one at least."""
        if tuple(kept) == read.counts:
            return
        self.put_back(read)
        if all(name.endswith("lengths_B") for name in read.lasting):
            kept_B = torch.tensor(kept, device=read.tokens_BT.device)
            for lengths_B in others(self._rows(slice(0, len(kept)))).values():
                lengths_B += kept_B
            self._note(0, [length + count for length, count in zip(read.lengths, kept, strict=True)])
        else:
            self._extend(read.tokens_BT[:, : max(kept)], 0, read.lengths, kept)

    def _lasting(self, rows: int) -> dict[str, Tensor]:
        """Copies of what tokens change for good in the first rows: all but keys and values in slots of their own."""
        return {name: x.clone() for name, x in others(self._rows(slice(0, rows))).items()}

    def decode_one(self, token: int, slot: int, length: int) -> Tensor:
        """hidden_1D of the next token of one slot; repeats a failed `decode` if `repeats` is True."""
        return self._extend(_tensor(self.model, [[token]]), slot, [length])[:, -1]

    def prefill(self, prompts: Prompts, seen: Seen) -> Tensor:
        """Reads chunks, and returns hidden_RD of the last tokens of the R prompts that end in them."""
        chunks = [chunk for chunk, _ in prompts]
        counts = [chunk.count for chunk in chunks]
        rows = [prompt[c.start : c.start + c.count] for c, prompt in prompts]
        lengths = [chunk.start for chunk in chunks]
        hidden_BTD = self._extend(prompt_tensor(self.model, rows), chunks[0].slot, lengths, counts)
        for chunk, hidden_TD in zip(chunks, hidden_BTD, strict=True):
            seen(chunk.request_id, chunk.start, hidden_TD[: chunk.count])
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

    def read_again(self, chunk: Chunk, prompt: Sequence[int], seen: Seen) -> Tensor:
        """Repeats `prefill` of one prompt, from its beginning, after a failure left its row in an unknown state."""
        self._empty(chunk.slot)
        end = chunk.start + chunk.count
        for first in range(0, end, chunk.count):
            tokens = prompt[first : min(first + chunk.count, end)]
            hidden_1TD = self._extend(prompt_tensor(self.model, [tokens]), chunk.slot, [first])
            seen(chunk.request_id, first, hidden_1TD[0])
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


def _tensor(model: DecoderLM, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=model.embedding.weight.device)
