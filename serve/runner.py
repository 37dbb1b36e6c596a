"""Plans in, logits out: with its pools, the only place that touches the device."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.models import CompiledDecode, DecoderLM
from serve.cache_manager import Release
from serve.caches import CacheChoice
from serve.memory import Memory, compressed_memory, exact_memory
from serve.pool import CompactPool, SlotPool
from serve.request import Request
from serve.scheduler import Chunk, Plan


class Runner:
    """Runs plans on a pool of states for every cache policy in use.

    max_num_seqs, max_model_len: rows of the full cache, and the tokens each has room for; max_num_seqs=0: nobody may
    use it. compile_decode: whether its decode steps are compiled. steps: compiled ones of compressed caches. Raises as
    `SlotPool`.
    """

    def __init__(
        self,
        model: DecoderLM,
        max_num_seqs: int,
        max_model_len: int,
        compile_decode: bool = False,
        steps: Mapping[CacheChoice, CompiledDecode] | None = None,
    ) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        with torch.inference_mode():
            self.full = SlotPool(model, max_num_seqs, max_model_len, compile_decode) if max_num_seqs else None
        self._steps = steps or {}
        self.compact: dict[CacheChoice, CompactPool] = {}
        self._full_bytes = lru_cache(maxsize=4096)(self._context_bytes)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all states as allocated."""
        full = 0 if self.full is None else self.full.nbytes
        return full + sum(pool.nbytes for pool in list(self.compact.values()))

    def memory(self, request: Request, slot: int) -> Memory:
        """What the state of a sequence that decodes takes, and would take in the full cache."""
        full = exact_memory(self.model, request.context, self._full_bytes(request.context))
        pool = self.compact.get(request.cache)
        if pool is None or pool.state is None:
            return full
        row = pool.row_of(slot)
        return compressed_memory(pool.policy, pool.state.layers, row, len(request.prompt), full)

    def kv_bytes(self, request: Request) -> int:
        """Bytes of a running request's state, for metrics: of a full cache what its tokens fill, without what is only
        reserved; of a compressed one what is allocated for it."""
        if request.cache.exact:
            return self._full_bytes(request.context)
        pool = self.compact.get(request.cache)
        return 0 if pool is None else pool.row_bytes(request.request_id)

    def _context_bytes(self, context: int) -> int:
        return self.model.cost(batch=1, tokens=1, context=context).state_bytes

    @torch.inference_mode()
    def run(self, plan: Plan, requests: Mapping[str, Request]) -> Tensor:
        """logits_RV of the sequences in `plan.sampled`, in that order."""
        parts = []
        for group, ids in plan.decode:
            last = [[requests[request_id].generated[-1]] for request_id in ids]
            tokens_B1 = torch.tensor(last, dtype=torch.long, device=self.device)
            parts.append(self._pool(group).decode(tokens_B1))
        for chunks in _batches(plan.prefill):
            prompts = [(chunk, requests[chunk.request_id].prompt) for chunk in chunks]
            parts.append(self._pool(chunks[0].group).prefill(prompts))
        hidden_RD = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.model.logits(hidden_RD)

    def joined(self, plan: Plan) -> list[tuple[CacheChoice, int]]:
        """Compressed pools that have new rows after this step, and the bytes of a row."""
        choices = dict.fromkeys(chunk.group for chunk in plan.prefill if chunk.last)
        pools = [(choice, self.compact[choice]) for choice in choices if choice in self.compact]
        return [(choice, pool.state.nbytes() // pool.rows) for choice, pool in pools if pool.state is not None]

    def _pool(self, choice: object) -> SlotPool | CompactPool:
        assert isinstance(choice, CacheChoice)
        if choice.exact:
            assert self.full is not None, "nobody may use the full cache"
            return self.full
        if choice not in self.compact:
            self.compact[choice] = CompactPool(self.model, choice.build(), self._steps.get(choice))
        return self.compact[choice]

    @torch.inference_mode()
    def release(self, request: Request, release: Release) -> None:
        """Forgets the state of a sequence; pools without any are gone."""
        self._pool(request.cache).release(request.request_id, release)
        pool = self.compact.get(request.cache)
        if pool is not None and not pool.nbytes:
            del self.compact[request.cache]


def _batches(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks that go through the model together: neighbours, as long as padding at most doubles the work."""
    batches: list[list[Chunk]] = []
    for chunk in chunks:
        together = [*batches[-1], chunk] if batches and batches[-1][0].group == chunk.group else []
        if together and _padded(together) <= 2 * sum(c.count for c in together):
            batches[-1].append(chunk)
        else:
            batches.append([chunk])
    return batches


def _padded(chunks: Sequence[Chunk]) -> int:
    return len(chunks) * max(chunk.count for chunk in chunks)
