"""Runs a step's plan and returns logits. Only this module, `serve.pools` and `serve.sampler` compute on the device.

An exception in the computation of one sequence fails that sequence. After an exception in a joint computation each
sequence is computed alone if that is safe; else all of them fail. All other sequences of the step go on.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnzoo.kvcache.choice import CacheChoice
from attnzoo.models import CompiledDecode, DecoderLM
from attnzoo.models.cache_use import CacheUse, compressed_use, exact_use
from attnzoo.models.decoder_lm import DecoderState
from attnzoo.models.row_sampling import RowWish, choose_rows
from serve.faults import DeviceError, SharedError, log
from serve.pools import AlonePool, CompactPool, HalfWrittenError, SlotPool
from serve.prefix import PrefixCache
from serve.request import Alone, Request
from serve.scheduling import Chunk, Release, Resume, Reuse, StepPlan
from serve.speculation import accepted


@dataclass(frozen=True)
class StepOutput:
    """The result of a step: logits_RV of the `sampled` requests in their order, and the error of each failed one. A
    request with drafted tokens is there several times, once for each of its tokens."""

    sampled: list[str]
    logits_RV: Tensor
    failed: dict[str, Exception]


Part = tuple[list[str], Tensor]
"""R requests, and hidden_RD of their last tokens."""


class Runner:
    """Runs plans, with one pool of states for each cache in use.

    max_num_seqs, max_model_len: rows of the full cache and tokens of each; max_num_seqs=0: there is no full cache.
    prefixes: beginnings of prompts that were read before. vocab_size: tokens that can be chosen; None: all of the
    model's.
    compile_decode: compile the full cache's decode steps. steps: compiled decode steps of compressed caches. Raises the
    errors of `SlotPool`.
    """

    def __init__(
        self,
        model: DecoderLM,
        max_num_seqs: int,
        max_model_len: int,
        compile_decode: bool = False,
        steps: Mapping[CacheChoice, CompiledDecode] | None = None,
        prefixes: PrefixCache | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.prefixes = prefixes
        self.device = model.embedding.weight.device
        with torch.inference_mode():
            self.full = SlotPool(model, max_num_seqs, max_model_len, compile_decode) if max_num_seqs else None
        self._steps = steps or {}
        self.compact: dict[CacheChoice | Alone, CompactPool] = {}
        self.full_bytes = lru_cache(maxsize=4096)(self._context_bytes)

    @property
    def pool_bytes(self) -> int:
        """Allocated bytes of all states."""
        full = 0 if self.full is None else self.full.nbytes
        return full + sum(pool.nbytes for pool in list(self.compact.values()))

    def memory(self, request: Request, slot: int) -> CacheUse:
        """The memory of a decoding sequence's state, and the memory it would take in the full cache."""
        full = exact_use(self.model, request.context, self.full_bytes(request.context))
        pool = self.compact.get(request.group)
        if pool is None or pool.state is None or request.cache.exact:
            return full
        row = pool.row_of(slot)
        return compressed_use(pool.policy, pool.state.layers, row, len(request.prompt), full)

    def kv_bytes(self, request: Request) -> int:
        """Bytes of a running request's state for the metrics: the part of the full cache that its tokens fill, or the
        memory allocated for its compressed cache."""
        if request.cache.exact:
            return self.full_bytes(request.context)
        pool = self.compact.get(request.group)
        return 0 if pool is None else pool.row_bytes(request.request_id)

    def _context_bytes(self, context: int) -> int:
        return self.model.cost(batch=1, tokens=1, context=context).state_bytes

    @torch.inference_mode()
    def run(
        self, plan: StepPlan, requests: Mapping[str, Request], drafts: Mapping[str, Sequence[int]] | None = None
    ) -> StepOutput:
        """Computes the plan. drafts: tokens that may follow the newest ones of decoding sequences in the full cache.
        Raises DeviceError if the device no longer works."""
        parts: list[Part] = []
        alone: list[Part] = []
        verified: list[StepOutput] = []
        failed: dict[str, Exception] = {}
        for exchange in plan.exchanges:
            pool = self._pool(exchange.group)
            if isinstance(pool, SlotPool):
                pool.exchange(exchange.slots)
        reused = {reuse.request_id: reuse for reuse in plan.reused}
        held: dict[object, list[str]] = {group: list(ids) for group, ids in plan.decode}
        for group, ids in plan.decode:
            sequences = [requests[request_id] for request_id in ids]
            if drafts and not drafts.keys().isdisjoint(ids):
                output = self._verify(group, sequences, drafts, failed)
                if output is not None:
                    verified.append(output)
                    continue
            found = self._decode(group, sequences, failed)
            (alone if isinstance(group, Alone) else parts).extend(found)
        for resume in plan.resumed:
            self._resume(resume, requests[resume.request_id], held.setdefault(resume.group, []), failed)
        for batch in _batches(plan.prefill, self.model.many_rows):
            for chunk in batch:
                if chunk.request_id in reused:
                    self._restore(reused.pop(chunk.request_id), requests[chunk.request_id], failed)
            chunks = [chunk for chunk in batch if chunk.request_id not in failed]
            if not chunks:
                continue
            found = self._prefill(chunks, requests, failed)
            (alone if isinstance(chunks[0].group, Alone) else parts).extend(found)
            rows = held.setdefault(chunks[0].group, [])
            rows += [request_id for ids, _ in found for request_id in ids]
            self._fail_lost_rows(chunks[0].group, rows, failed)
        if not alone and not verified:
            return self._logits(parts, failed)
        # The rounding of a row depends on how many there are, so that a request that runs alone has its own logits.
        outputs = [self._logits(some, failed) for some in (parts, *([part] for part in alone))] + verified
        outputs = [output for output in outputs if output.sampled] or outputs[:1]
        sampled = [request_id for output in outputs for request_id in output.sampled]
        return StepOutput(sampled, torch.cat([output.logits_RV for output in outputs]), failed)

    def _decode(self, group: object, requests: list[Request], failed: dict[str, Exception]) -> list[Part]:
        pool = self._pool(group)
        ids, last = [request.request_id for request in requests], [request.generated[-1] for request in requests]
        lengths = [request.context for request in requests]
        tokens_B1 = torch.tensor(last, dtype=torch.long, device=self.device)[:, None]
        try:
            return [(ids, pool.decode(tokens_B1, lengths))]
        except Exception as failure:
            self.check_device(failure)
            if isinstance(pool, SlotPool) and pool.repeats and not isinstance(failure, HalfWrittenError):
                again = [partial(pool.decode_one, *one) for one in zip(last, range(len(ids)), lengths, strict=True)]
                return self._one_by_one(ids, again, failed)
            if isinstance(pool, CompactPool):
                pool.drop()
            failed.update(dict.fromkeys(ids, _shared(failure, ids)))
            return []

    def _verify(
        self,
        group: object,
        requests: list[Request],
        drafts: Mapping[str, Sequence[int]],
        failed: dict[str, Exception],
    ) -> StepOutput | None:
        """Reads what is drafted behind the newest tokens of sequences in the full cache, and keeps what the model
        chooses itself. None where that failed and left no trace, so that they may decode without."""
        pool, ids = self._pool(group), [request.request_id for request in requests]
        assert isinstance(pool, SlotPool)
        given = [[request.generated[-1], *drafts.get(request.request_id, ())] for request in requests]
        counts = [len(tokens) for tokens in given]
        tokens_BT = pad_sequence([torch.tensor(tokens) for tokens in given], batch_first=True).to(self.device)
        read = None
        try:
            hidden_BTD, read = pool.verify(tokens_BT, [request.context for request in requests], counts)
            logits_RV = self.model.logits(torch.cat([hidden_BTD[row, :count] for row, count in enumerate(counts)]))
            chosen = choose_rows(logits_RV[:, : self.vocab_size], [RowWish()] * len(logits_RV))
        except Exception as failure:
            self.check_device(failure)
            if read is not None:
                pool.put_back(read)
            log("tokens could not be drafted", failure)
            return None
        best = [None if found is None else found[0] for found in chosen]
        starts = list(accumulate(counts, initial=0))[:-1]
        kept = [accepted(tokens, best[start:]) for tokens, start in zip(given, starts, strict=True)]
        try:
            pool.keep(read, kept)
        except Exception as failure:
            self.check_device(failure)
            failed.update(dict.fromkeys(ids, _shared(failure, ids)))
            return StepOutput([], logits_RV[:0], failed)
        rows = [row for start, count in zip(starts, kept, strict=True) for row in range(start, start + count)]
        names = [name for name, count in zip(ids, kept, strict=True) for _ in range(count)]
        return StepOutput(names, logits_RV[rows], failed)

    def held(self, request: Request, slot: int) -> int:
        """Bytes of `copy`."""
        return self._pool(request.group).held(slot)

    @torch.inference_mode()
    def copy(self, request: Request, slot: int) -> DecoderState:
        """The state of a sequence that decodes, to go on with later."""
        return self._pool(request.group).copy(slot)

    def _resume(self, resume: Resume, request: Request, rows: list[str], failed: dict[str, Exception]) -> None:
        """Puts back the state of a sequence that was set aside. rows: the others of its group, and then it, too."""
        assert request.aside is not None
        rows.append(resume.request_id)
        try:
            self._pool(resume.group).put(resume.slot, request.context, request.aside)
        except Exception as failure:
            self.check_device(failure)
            failed[resume.request_id] = failure
            self._fail_lost_rows(resume.group, rows, failed)

    def _restore(self, reuse: Reuse, request: Request, failed: dict[str, Exception]) -> None:
        """Copies what of a prompt was read before. No other sequence has a part in it."""
        assert self.prefixes is not None
        copied, pool = partial(self.prefixes.restore, reuse.request_id), self._pool(reuse.group)
        try:
            if isinstance(pool, SlotPool):
                pool.restore(reuse, copied)
            else:
                pool.restore(reuse, request.prompt, copied)
        except Exception as failure:
            self.check_device(failure)
            failed[reuse.request_id] = failure

    def _keep(self, chunk: Chunk, state: DecoderState) -> None:
        """Keeps what was read of a prompt for others that begin alike. A failure ends that, and fails no request."""
        if self.prefixes is None:
            return
        try:
            self.prefixes.keep(chunk.request_id, state, chunk.start, chunk.start + chunk.count)
        except Exception as failure:
            self.check_device(failure)
            self.prefixes.remove_keys(chunk.request_id)
            log("the beginning of a prompt could not be kept", failure)

    def _prefill(
        self, chunks: list[Chunk], requests: Mapping[str, Request], failed: dict[str, Exception]
    ) -> list[Part]:
        pool = self._pool(chunks[0].group)
        prompts = [(chunk, requests[chunk.request_id].prompt) for chunk in chunks]
        ids = [chunk.request_id for chunk in chunks]
        seen = partial(self._seen, requests)
        if isinstance(pool, CompactPool):
            read = partial(pool.read, *prompts[0], partial(self._keep, chunks[0]), seen)
            return self._one_by_one(ids, [read], failed)
        try:
            hidden_RD = pool.prefill(prompts, seen)
            for chunk in chunks:
                self._keep(chunk, pool.row(chunk.slot))
            return [([chunk.request_id for chunk in chunks if chunk.last], hidden_RD)]
        except Exception as failure:
            self.check_device(failure)
            if len(ids) == 1:
                failed[ids[0]] = failure
                return []
            again = [partial(pool.read_again, chunk, prompt, seen) for chunk, prompt in prompts]
            return self._one_by_one(ids, again, failed)

    def _seen(self, requests: Mapping[str, Request], request_id: str, start: int, hidden_TD: Tensor) -> None:
        """Notes what a part of a prompt says of its own tokens, where the request wants to know."""
        scores = requests[request_id].scores
        if scores is not None:
            scores.note(start, hidden_TD, lambda hidden: self.model.logits(hidden)[:, : self.vocab_size])

    def _one_by_one(
        self, ids: Sequence[str], work: Sequence[Callable[[], Tensor]], failed: dict[str, Exception]
    ) -> list[Part]:
        """Computes each sequence alone. work: one function for each request, which returns one row or none."""
        parts = []
        for request_id, one in zip(ids, work, strict=True):
            try:
                hidden_RD = one()
                parts.append(([request_id] * len(hidden_RD), hidden_RD))
            except Exception as failure:
                self.check_device(failure)
                failed[request_id] = failure
        return parts

    def _fail_lost_rows(self, group: object, rows: list[str], failed: dict[str, Exception]) -> None:
        """Fails the requests `rows` of a group if the newest failure has destroyed all rows of its pool."""
        pool = self._pool(group)
        if isinstance(pool, CompactPool) and pool.state is None:
            lost = [request_id for request_id in rows if request_id not in failed]
            if lost:
                failed.update(dict.fromkeys(lost, SharedError(next(reversed(failed.values())))))

    def _logits(self, parts: list[Part], failed: dict[str, Exception]) -> StepOutput:
        ids = [request_id for names, _ in parts for request_id in names]
        if not ids:
            return StepOutput([], torch.empty(0, 0), failed)
        hidden_RD = torch.cat([hidden for _, hidden in parts])
        kept = [row for row, request_id in enumerate(ids) if request_id not in failed]
        if len(kept) < len(ids):
            ids, hidden_RD = [ids[row] for row in kept], hidden_RD[kept]
        try:
            return StepOutput(ids, self.model.logits(hidden_RD), failed)
        except Exception as failure:
            self.check_device(failure)
            rows = [partial(self.model.logits, hidden_RD[row : row + 1]) for row in range(len(ids))]
            parts = self._one_by_one(ids, rows, failed)
        if not parts:
            return StepOutput([], torch.empty(0, 0), failed)
        return StepOutput([names[0] for names, _ in parts], torch.cat([logits for _, logits in parts]), failed)

    def check_device(self, failure: BaseException) -> None:
        """Raises DeviceError from `failure` if the device no longer computes."""
        try:
            answer = float(torch.ones(2, device=self.device).sum())
        except Exception:
            answer = 0.0
        if answer != 2.0:
            raise DeviceError(f"the device {self.device} does not answer") from failure

    @torch.inference_mode()
    def clear(self) -> None:
        """Clears the states of all sequences, and what is kept of their prompts."""
        self.compact.clear()
        if self.prefixes is not None:
            self.prefixes.clear()
        if self.full is not None:
            self.full.clear()

    def joined(self, plan: StepPlan) -> list[tuple[CacheChoice | Alone, int]]:
        """(group, bytes of a row) for each compressed pool that got new rows in this step."""
        choices = dict.fromkeys([*(c.group for c in plan.prefill if c.last), *(r.group for r in plan.resumed)])
        pools = [(choice, self.compact[choice]) for choice in choices if choice in self.compact]
        return [(choice, pool.state.nbytes() // pool.rows) for choice, pool in pools if pool.state is not None]

    def _pool(self, choice: object) -> SlotPool | CompactPool:
        if isinstance(choice, Alone):
            if choice not in self.compact:
                self.compact[choice] = AlonePool(self.model, choice)
            return self.compact[choice]
        assert isinstance(choice, CacheChoice)
        if choice.exact:
            assert self.full is not None, "there is no full cache"
            return self.full
        if choice not in self.compact:
            self.compact[choice] = CompactPool(self.model, choice.build(), self._steps.get(choice))
        return self.compact[choice]

    @torch.inference_mode()
    def release(self, request: Request, release: Release) -> None:
        """Frees the state of a sequence, and removes its pool if that is empty."""
        self._pool(request.group).release(request.request_id, release)
        pool = self.compact.get(request.group)
        if pool is not None and not pool.nbytes:
            del self.compact[request.group]


def _shared(failure: Exception, ids: Sequence[str]) -> Exception:
    """The failure itself for a single request; for several, an error without the failure's text."""
    return failure if len(ids) == 1 else SharedError(failure)


def _batches(chunks: Sequence[Chunk], many: int | None = None) -> list[list[Chunk]]:
    """Groups chunks that go through the model together: neighbours in the full cache, as long as padding at most
    doubles the work. Prompts for compressed caches are read one by one. many: chunks of so many tokens and shorter ones
    are not computed together, so that what is computed of each does not depend on its neighbours."""
    batches: list[list[Chunk]] = []
    for chunk in _in_turns(chunks):
        before = batches[-1][-1] if batches else None
        exact = isinstance(chunk.group, CacheChoice) and chunk.group.exact
        neighbours = exact and before is not None and before.group == chunk.group and before.slot + 1 == chunk.slot
        if neighbours and before is not None and many is not None:
            neighbours = (before.count >= many) == (chunk.count >= many)
        together = [*batches[-1], chunk] if neighbours else []
        if together and _padded(together) <= 2 * sum(c.count for c in together):
            batches[-1].append(chunk)
        else:
            batches.append([chunk])
    return batches


def _in_turns(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks in the full cache so that the first ones of all prompts come before the second ones."""
    seen: Counter[str] = Counter()
    order: list[tuple[int, int]] = []
    for index, chunk in enumerate(chunks):
        follows = index > 0 and chunks[index - 1].group == chunk.group
        block = order[-1][0] + (not follows) if order else 0
        exact = isinstance(chunk.group, CacheChoice) and chunk.group.exact
        order.append((block, seen[chunk.request_id] if exact else 0))
        seen[chunk.request_id] += 1
    return [chunks[index] for index in sorted(range(len(chunks)), key=order.__getitem__)]


def _padded(chunks: Sequence[Chunk]) -> int:
    return len(chunks) * max(chunk.count for chunk in chunks)
