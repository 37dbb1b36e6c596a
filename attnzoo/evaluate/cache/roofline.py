"""What a decode step would take on a chip, by a model: the larger of bytes over bandwidth and FLOPs over peak.

A model, not a measurement. It counts the weights once a step for all sequences, the whole state of each, and two FLOPs
a weight and token and a cached element and query head that reads it. Launches, the writing of new keys and everything
that does not overlap are left out, so real speed-ups are smaller where steps are short.
"""

from dataclasses import dataclass

from attnzoo.evaluate.chips import Chip


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one decode step of `batch` sequences: bytes read and FLOPs."""

    nbytes: int
    flops: int

    def seconds(self, chip: Chip, precision: str = "bf16") -> float:
        """By the roofline."""
        return max(self.nbytes / chip.bandwidth, self.flops / chip.flops(precision))


def step_cost(*, weight_bytes: int, weights: int, state_bytes: int, width: int, group: int, batch: int) -> StepCost:
    """`weights`: parameters that a token is multiplied by; `state_bytes`: of one sequence; `width`: bytes of a cached
    element; `group`: query heads that share a kv head."""
    elements = state_bytes // width
    return StepCost(
        nbytes=weight_bytes + batch * state_bytes,
        flops=batch * 2 * (weights + group * elements),
    )
