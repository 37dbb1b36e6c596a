"""Simulates the memory of a forward and a backward pass: tensors are allocated and released in autograd's order.

Nothing is computed. Each part of a model records its operations on a `Tape`: the bytes that an operation allocates,
saves for the backward pass and needs temporarily. `Tape.backward` then replays the operations in reverse as torch's
autograd engine does: the node created last runs first, its saved tensors and its incoming gradient are released after
it, and gradients of one tensor are summed in place. Tests compare the totals with the records of torch's allocator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from attnzoo.types import accumulation_dtype, dtype_bytes


@dataclass(eq=False)
class Buffer:
    """A tensor's memory in bytes. heads_first: its memory order is [B, N, T, H], so that merging heads copies it."""

    size: int
    heads_first: bool = False
    references: int = 1


@dataclass(eq=False)
class Weight(Buffer):
    """A parameter that several operations read; its gradient is complete after the last of them."""

    uses: int = 0


@dataclass(kw_only=True)
class Step:
    """One operation. All sizes are in bytes. out: its result.

    saves: tensors saved for the backward pass; saves_out: the result is saved too; keeps: other memory saved. scratch,
    backward: temporaries of the forward and of the backward pass. weights: gradients of parameters, which live until
    they are added to the existing ones. shared: a parameter that other operations read too. grads: each input's
    gradient (None: the input's size). passes: the inputs' gradients are the result's, without new memory. copies: an
    incoming gradient with heads first is copied. scatters: the inputs' gradients have heads first.
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
    """A part under `torch.utils.checkpoint`: it keeps only its input, and runs again in the backward pass."""

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
    """Counts `held` bytes now and `peak` bytes so far, without parameters, their gradients and the first input. saving:
    whether operations save tensors for the backward pass."""

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
        """Bytes of one element."""
        return dtype_bytes(self.dtype)

    @property
    def sum_width(self) -> int:
        """Bytes of one element in sums over tokens."""
        return dtype_bytes(accumulation_dtype(self.dtype))

    def rows(self, channels: int) -> int:
        """Bytes of a tensor [B, T, channels]."""
        return self.batch * self.tokens * channels * self.width

    def new(self, size: int, *, heads_first: bool = False) -> Buffer:
        """Allocates a tensor of `size` bytes."""
        self.held += size
        self.peak = max(self.peak, self.held)
        return Buffer(size, heads_first)

    def touch(self, size: int) -> None:
        """Allocates `size` bytes and releases them at once."""
        self.peak = max(self.peak, self.held + size)

    def drop(self, *buffers: Buffer) -> None:
        """Drops one reference to each buffer; dropping the last one releases the memory."""
        for buffer in buffers:
            buffer.references -= 1
            assert buffer.references >= 0, "dropped more often than held"
            if buffer.references == 0:
                self.held -= buffer.size

    def do(self, step: Step) -> Buffer:
        """Records one operation of the forward pass; the caller holds the result until it drops it."""
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
        """Records a part with activation checkpointing: only its input is kept, and the backward pass runs it again."""
        self.saving, before = False, self.saving
        out = run(self, given)
        self.saving = before
        given.references += 1
        self.nodes.append(_Recomputed(run, given, out))
        return out

    def backward(self, out: Buffer, gradient: int | None = None) -> None:
        """Runs the backward pass from `out`. gradient: bytes of its gradient (None: memory of the caller)."""
        self.gradients[out] = Buffer(0) if gradient is None else self.new(gradient)
        self.play_back()

    def play_back(self) -> None:
        """Runs the recorded nodes backward, the last one first."""
        while self.nodes:
            self.nodes.pop().play(self)

    def take_gradient(self, buffer: Buffer) -> Buffer:
        """Removes and returns the summed gradient of a tensor, after all operations that read it have run backward."""
        return self.gradients.pop(buffer)

    def give_gradient(self, buffer: Buffer, new: Buffer) -> None:
        """Adds `new` to the gradient of a tensor: in place, unless another tensor's gradient shares its memory."""
        known = self.gradients.get(buffer)
        if known is None:
            self.gradients[buffer] = new
            return
        if known.references > 1:
            self.gradients[buffer] = self.new(new.size)
            self.drop(known)
        self.drop(new)

    def share(self, weight: Weight) -> None:
        """Adds one operation's gradient of a shared parameter; after the last operation the sum is released."""
        self.give_gradient(weight, self.new(weight.size))
        weight.uses -= 1
        if weight.uses == 0:
            self.drop(self.take_gradient(weight))
