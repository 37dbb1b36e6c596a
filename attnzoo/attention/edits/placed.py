"""Where the queries of a call stand."""

from functools import cached_property

import torch
from torch import Tensor

from attnzoo.ops.common.step_inputs import Memo, StepInputs


class Placed(Memo):
    """Where the queries of a call stand in their sequences, for all layers that share it.

    positions_BT: -1 for what is not of the sequence, such as padding. It is not written to afterwards.
    """

    def __init__(self, positions_BT: Tensor) -> None:
        self.positions_BT = positions_BT

    @classmethod
    def of(cls, step: StepInputs) -> "Placed":
        """Those of a step, -1 for right padding."""
        if step.counts_B is None:
            return cls(step.positions_BT)
        index_T = torch.arange(step.tokens, device=step.positions_BT.device)
        return cls(step.positions_BT.masked_fill(index_T >= step.counts_B[:, None], -1))

    @cached_property
    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """The positions as integers."""
        return tuple(map(tuple, self.positions_BT.tolist()))

    @cached_property
    def ends(self) -> list[tuple[int, int]]:
        """The first and the last of each row's positions, which follow each other but for those of -1."""
        return list(zip(self.positions_BT.amin(1).tolist(), self.positions_BT.amax(1).tolist(), strict=True))
