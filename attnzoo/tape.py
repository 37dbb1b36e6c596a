"""A model of memory: the tensors of a forward and a backward pass, allocated and released in autograd's order.

Nothing is computed: a part of a model plays its operations on a `Tape`, with what each allocates, saves for the
backward pass and needs in passing. `Tape.backward` then plays them in reverse as torch's engine does: the last created
node first, its saved tensors and the gradient it was given released once it has run, gradients of one tensor summed in
place. Bytes count what torch's allocator is asked for; tests hold the totals against its records.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from attnzoo.types import accumulation_dtype, dtype_bytes


@dataclass(eq=False)
class Buffer:
    """A tensor's memory. heads_first: its memory order is [B, N, T, H], so that merging heads must copy."""

    size: int
    heads_first: bool = False
    references: int = 1


@dataclass(eq=False)
class Weight(Buffer):
    """A parameter that more than one operation reads: its gradient waits for the last of them."""

    uses: int = 0


@dataclass(kw_only=True)
class Step:
    """One operation. out: bytes of its result.

    saves: tensors kept for the backward pass; saves_out: the result too; keeps: bytes of other tensors kept.
    scratch, backward: bytes of temporaries in either pass. weights: bytes of the parameters' gradients, which live
    until they are added to those that exist. grads: bytes of each input's gradient (None: those of the input);
    passes: the gradient of the result is that of the inputs, no new memory. copies: a gradient that comes heads first
    is copied. scatters: gradients of the inputs come heads first.
    """

    out: int
    inputs: Sequence[Buffer] = ()
    saves: Sequence[Buffer] = ()
    saves_out: bool = False
    keeps: int = 0
    scratch: int = 0
    backward: int = 0
    weights: int = 0
    shared: Weight | None = None
    grads: Sequence[int] | None = None
    passes: bool = False
    copies: bool = False
    scatters: bool = False
    heads_first: bool = False


@dataclass(eq=False)
class _Node:
    step: Step
    out: Buffer
    saved: list[Buffer]

    def play(self, tape: "Tape") -> None:
        step, gradient = self.step, tape.take_gradient(self.out)
        sizes = [buffer.size for buffer in step.inputs] if step.grads is None else step.grads
        if step.copies and gradient.heads_first:
            copy = tape.new(gradient.size)
            tape.drop(gradient)
            gradient = copy
        if step.passes:
            gradients = [gradient for _ in step.inputs]
            gradient.references += len(gradients)
        else:
            gradients = [tape.new(size, heads_first=step.scatters) for size in sizes]
        tape.touch(step.backward + step.weights)
        if step.shared is not None:
            tape.share(step.shared)
        tape.drop(gradient, *self.saved)
        for buffer, new in zip(step.inputs, gradients, strict=True):
            tape.give_gradient(buffer, new)


@dataclass(eq=False)
class _Recomputed:
    """What `torch.utils.checkpoint` leaves of a part: its input."""

    run: Callable[["Tape", Buffer], Buffer]
    given: Buffer
    out: Buffer

    def play(self, tape: "Tape") -> None:
        outer, tape.nodes = tape.nodes, []
        again = self.run(tape, self.given)
        tape.drop(again)
        tape.gradients[again] = tape.take_gradient(self.out)
        tape.play_back()
        tape.nodes = outer
        tape.drop(self.given)


@dataclass
class Tape:
    """`held` bytes now and `peak` so far, beyond parameters, their gradients and the input of the first operation."""

    batch: int
    tokens: int
    dtype: torch.dtype
    held: int = 0
    peak: int = 0
    saving: bool = True
    nodes: list[_Node | _Recomputed] = field(default_factory=list)
    gradients: dict[Buffer, Buffer] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return dtype_bytes(self.dtype)

    @property
    def sum_width(self) -> int:
        """Bytes of an element of sums over time."""
        return dtype_bytes(accumulation_dtype(self.dtype))

    def rows(self, channels: int) -> int:
        """Bytes of a tensor [B, T, channels]."""
        return self.batch * self.tokens * channels * self.width

    def new(self, size: int, *, heads_first: bool = False) -> Buffer:
        """Allocates."""
        self.held += size
        self.peak = max(self.peak, self.held)
        return Buffer(size, heads_first)

    def touch(self, size: int) -> None:
        """Allocates and releases."""
        self.peak = max(self.peak, self.held + size)

    def drop(self, *buffers: Buffer) -> None:
        """One reference less; memory goes with the last one."""
        for buffer in buffers:
            buffer.references -= 1
            assert buffer.references >= 0, "dropped more often than held"
            if buffer.references == 0:
                self.held -= buffer.size

    def do(self, step: Step) -> Buffer:
        """Plays an operation forward; the caller holds the result until it drops it."""
        out = self.new(step.out, heads_first=step.heads_first)
        saved: list[Buffer] = []
        if self.saving:
            saved = [*step.saves, *([out] if step.saves_out else [])]
            for buffer in saved:
                buffer.references += 1
            saved.append(self.new(step.keeps))
            self.touch(step.scratch)
        else:
            self.touch(step.keeps + step.scratch)
        if step.shared is not None:
            step.shared.uses += int(self.saving)
        if self.saving:
            self.nodes.append(_Node(step, out, saved))
        return out

    def checkpoint(self, run: Callable[["Tape", Buffer], Buffer], given: Buffer) -> Buffer:
        """Plays a part of which only the input is kept; the backward pass plays it again."""
        self.saving, before = False, self.saving
        out = run(self, given)
        self.saving = before
        given.references += 1
        self.nodes.append(_Recomputed(run, given, out))
        return out

    def backward(self, out: Buffer, gradient: int | None = None) -> None:
        """The backward pass from `out`; `gradient`: bytes of its gradient (None: given from outside)."""
        self.gradients[out] = Buffer(0) if gradient is None else self.new(gradient)
        self.play_back()

    def play_back(self) -> None:
        """All nodes, the last one first."""
        while self.nodes:
            self.nodes.pop().play(self)

    def take_gradient(self, buffer: Buffer) -> Buffer:
        """The summed gradient of a tensor, once all its readers have run."""
        return self.gradients.pop(buffer)

    def give_gradient(self, buffer: Buffer, new: Buffer) -> None:
        """Adds to the gradient of a tensor: in place, unless another tensor's gradient is the same memory."""
        known = self.gradients.get(buffer)
        if known is None:
            self.gradients[buffer] = new
            return
        if known.references > 1:
            self.gradients[buffer] = self.new(new.size)
            self.drop(known)
        self.drop(new)

    def share(self, weight: Weight) -> None:
        """One reader of a shared parameter has made its gradient; after the last one it is added to what exists."""
        self.give_gradient(weight, self.new(weight.size))
        weight.uses -= 1
        if weight.uses == 0:
            self.drop(self.take_gradient(weight))
