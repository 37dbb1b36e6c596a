"""What all layers of one call of `extend` share: where its tokens stand, and what follows from that, computed once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Integers = tuple[tuple[int, ...], tuple[int, ...]]
"""(lengths, counts) of rows: tokens before a call, and real ones in it."""


class Memo:
    """Base of objects that keep what follows from them, for all layers that have the object."""

    def once(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """`make(self, *arguments)`, computed the first time and kept as long as this object: by the function and equal
        arguments, so that what `make` returns must follow from these and this object alone."""
        if torch.compiler.is_compiling():  # its sizes are symbols, and a compiled step is one layer alone
            return make(self, *arguments)
        made: dict[Any, T] = self.__dict__.setdefault("_made", {})  # no field: a copy by `replace` begins anew
        key = (make, arguments)
        if key not in made:
            made[key] = make(self, *arguments)
        return made[key]


@dataclass(frozen=True, eq=False)
class StepInputs(Memo):
    """The tokens of one call of `extend`, for all of its layers; made by `of` or `planned`.

    positions_BT (int64): their logical positions. counts_B: how many of them are real in each row, the rest being right
    padding; None: all. known: the same as integers, where whoever made it knew them.
    """

    positions_BT: Tensor
    counts_B: Tensor | None = None
    known: Integers | None = None

    @classmethod
    def of(cls, lengths_B: Tensor, tokens: int, counts_B: Tensor | None = None) -> "StepInputs":
        """`tokens` new tokens of rows with lengths_B before them; no value is looked at."""
        return cls(lengths_B[:, None] + torch.arange(tokens, device=lengths_B.device), counts_B)

    @classmethod
    def planned(
        cls, lengths: Sequence[int], tokens: int, counts: Sequence[int] | None = None, device: Any = None
    ) -> "StepInputs":
        """Of numbers that a scheduler knows, so that no device is waited for. counts: None: all tokens are real."""
        given = tuple(counts or (tokens,) * len(lengths))
        counts_B = torch.tensor(given, device=device) if min(given, default=tokens) < tokens else None
        return cls(
            torch.tensor(lengths, device=device)[:, None] + torch.arange(tokens, device=device),
            counts_B,
            (tuple(lengths), given),
        )

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions_BT.shape[1]

    def before(self) -> Tensor:
        """lengths_B: tokens of each row before the call."""
        return self.positions_BT[:, 0]

    def after(self) -> Tensor:
        """lengths_B after it."""
        return self.before() + (self.tokens if self.counts_B is None else self.counts_B)

    def integers(self) -> Integers:
        """(lengths, counts), for which a device is waited once where they are not known."""
        return self.known or self.once(_waited)


def _waited(step: StepInputs) -> Integers:
    lengths = tuple(step.before().tolist())
    return lengths, (step.tokens,) * len(lengths) if step.counts_B is None else tuple(step.counts_B.tolist())


def token_of(step: StepInputs, t: int) -> StepInputs:
    """Token t of every row alone; a row whose tokens have ended stays at its length. By `once`."""
    if step.counts_B is None:
        return StepInputs.of(step.positions_BT[:, t], 1)
    return StepInputs.of(step.before() + step.counts_B.clamp(max=t), 1, (step.counts_B > t).long())
