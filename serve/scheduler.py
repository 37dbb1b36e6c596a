"""Continuous batching, planned with integers: which sequences run in the next step, and how many tokens each.

Every sequence that decodes gets its token in every step, so prompts never starve it; what is left of the token budget
goes to prompts, first come first served, in chunks. A prompt that does not fit the budget is continued in the next
step, before any other starts; so at most one prompt is unfinished between steps.
"""

from collections import deque
from dataclasses import dataclass

from serve.cache_manager import Release, SlotTable


class QueueFullError(Exception):
    """No room for another request; the client should come back later."""


@dataclass(frozen=True)
class Chunk:
    """`count` prompt tokens from `start` on of the sequence in `slot`; `last`: the prompt ends with them."""

    request_id: str
    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Plan:
    """One step: sequences that decode (the one at index i is in slot i), then chunks of prompts by slot."""

    decode: tuple[str, ...]
    prefill: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.decode) + sum(chunk.count for chunk in self.prefill)

    @property
    def sampled(self) -> list[str]:
        """Sequences that get a new token, in the order of the runner's logits."""
        return [*self.decode, *(chunk.request_id for chunk in self.prefill if chunk.last)]


class Scheduler:
    """Admits, plans and releases. `max_queue`: how many requests may wait while all slots are taken.

    Raises ValueError for limits under which prompts could not advance.
    """

    def __init__(self, max_num_seqs: int, max_batched_tokens: int, max_queue: int) -> None:
        if max_num_seqs < 1 or max_queue < 0:
            raise ValueError(f"max_num_seqs={max_num_seqs} must be at least 1, max_queue={max_queue} at least 0")
        if max_batched_tokens <= max_num_seqs:
            raise ValueError(
                f"max_batched_tokens={max_batched_tokens} must be larger than max_num_seqs={max_num_seqs}: "
                "when all slots decode, prompts need what is left"
            )
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.max_queue = max_queue
        self.slots = SlotTable(max_num_seqs)
        self._waiting: deque[str] = deque()
        self._prompt: dict[str, int] = {}
        self._planned: dict[str, int] = {}

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self.slots)

    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._prompt)

    def add(self, request_id: str, prompt_tokens: int) -> None:
        """Queues a request. Raises QueueFullError when the queue is full, ValueError for a used id or no tokens."""
        if request_id in self._prompt:
            raise ValueError(f"request id {request_id!r} is in use; give every request its own")
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        if len(self._prompt) >= self.max_num_seqs + self.max_queue:
            raise QueueFullError(f"{self.num_running} requests are running and {self.num_waiting} waiting")
        self._waiting.append(request_id)
        self._prompt[request_id] = prompt_tokens

    def schedule(self) -> Plan:
        """The next step. The caller must run it: its tokens count as done from now on."""
        decode = tuple(self.slots.ids[: self.slots.decoding])
        budget = self.max_batched_tokens - len(decode)
        chunks = [self._chunk(slot, budget) for slot in range(len(decode), len(self.slots))]
        budget -= sum(chunk.count for chunk in chunks)
        while budget > 0 and self._waiting and self.slots.free:
            request_id = self._waiting.popleft()
            self._planned[request_id] = 0
            chunks.append(self._chunk(self.slots.take(request_id), budget))
            budget -= chunks[-1].count
        self.slots.decoding += sum(chunk.last for chunk in chunks)
        return Plan(decode, tuple(chunks))

    def _chunk(self, slot: int, budget: int) -> Chunk:
        request_id = self.slots.ids[slot]
        start, total = self._planned[request_id], self._prompt[request_id]
        count = min(budget, total - start)
        self._planned[request_id] += count
        return Chunk(request_id, slot, start, count, last=start + count == total)

    def finish(self, request_id: str) -> Release | None:
        """Removes a request, finished or aborted. Returns what its slot needs, None when it had none.

        Raises KeyError for an unknown id.
        """
        del self._prompt[request_id]
        if self._planned.pop(request_id, None) is None:
            self._waiting.remove(request_id)
            return None
        return self.slots.release(request_id)
