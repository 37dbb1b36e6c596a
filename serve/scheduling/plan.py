"""What the scheduler is told of requests, and what it plans: records of integers."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Group = Hashable
"""The common property of sequences that decode together: their cache."""


@dataclass(frozen=True)
class Demand:
    """Memory of a sequence in its `group`: `row_bytes` while it decodes, as much as the largest row of the group takes,
    `prompt_bytes` while its prompt is read, and `own_bytes`, whatever others take, from its beginning to its end."""

    group: Group = None
    row_bytes: int = 0
    prompt_bytes: int = 0
    own_bytes: int = 0

    @property
    def most(self) -> int:
        """Most bytes that the sequence takes: at the end of its prompt it takes all of them."""
        return self.row_bytes + self.prompt_bytes + self.own_bytes


@dataclass(eq=False, slots=True)
class Entry:
    """A request that has not ended. prompt: its tokens; borders: where chunks of it must end. arrival: the clock when
    it came; order: its number. priority: the lower, the more urgent. movable: whether it may be set aside.

    place: where it is; "aside" is a sequence that has decoded, and whose state is kept. read: tokens of the prompt that
    were read or copied, those of a step that is planned included."""

    request_id: str
    prompt: int
    borders: Sequence[int]
    demand: Demand
    arrival: int
    order: int
    priority: int
    movable: bool
    place: Literal["waiting", "running", "aside"] = "waiting"
    read: int = 0

    @property
    def group(self) -> Group:
        """Of its demand."""
        return self.demand.group

    @property
    def left(self) -> int:
        """Prompt tokens that have not been read."""
        return self.prompt - self.read

    @property
    def rank(self) -> tuple[int, int]:
        """The most urgent first, and of those the one that came first."""
        return self.priority, self.order


@dataclass(frozen=True)
class Chunk:
    """`count` prompt tokens, from `start` on, of the sequence in `slot` of `group`. last: the prompt ends with them."""

    request_id: str
    group: Group
    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class Reuse:
    """The prompt of the sequence in `slot` of `group`, of which `start` tokens were read, goes on from the `end`-th:
    what lies between is copied."""

    request_id: str
    group: Group
    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Resume:
    """The sequence that was set aside goes on in `slot` of `group`. It decodes from the next step on."""

    request_id: str
    group: Group
    slot: int


@dataclass(frozen=True)
class Exchange:
    """Exchanges the sequences in two slots of a group."""

    group: Group
    slots: tuple[int, int]


@dataclass(frozen=True)
class StepPlan:
    """One step: first exchanges of slots, then decoding sequences by group (index i is in slot i of its group), then
    sequences that go on, then chunks of prompts, those of prompts that end first, and of each in order. What is reused
    of a prompt is copied before its first chunk, and not earlier, since its memory counts from then on."""

    decode: tuple[tuple[Group, tuple[str, ...]], ...]
    prefill: tuple[Chunk, ...]
    exchanges: tuple[Exchange, ...] = ()
    reused: tuple[Reuse, ...] = ()
    resumed: tuple[Resume, ...] = ()

    @property
    def decoding(self) -> list[str]:
        """All decoding sequences, in order."""
        return [request_id for _, ids in self.decode for request_id in ids]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that go through the model."""
        return len(self.decoding) + sum(chunk.count for chunk in self.prefill)

    @property
    def sampled(self) -> list[str]:
        """Sequences that get a new token, in the order of the runner's logits."""
        return [*self.decoding, *(chunk.request_id for chunk in self.prefill if chunk.last)]


class Prefixes(Protocol):
    """What is known of beginnings of prompts that were read before."""

    def reach(self, request_id: str, at: int) -> int:
        """From where a prompt of which `at` tokens were read may go on; `at` where nothing more is known."""

    def claim(self, request_id: str, at: int) -> Hashable:
        """What its next tokens will make known, which others wait for; None: nothing."""


class NoPrefixes:
    """Where nothing is reused."""

    def reach(self, request_id: str, at: int) -> int:
        """`at`."""
        return at

    def claim(self, request_id: str, at: int) -> None:
        """None."""
