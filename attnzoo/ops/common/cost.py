"""What an operation must spend, whatever runs it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """bytes_read, bytes_written: what must pass between memory and processor even if all else stays on chip, inputs
    once and results once. flops: of matrix products and weighted sums of rows, multiply and add counted apart; not of
    elementwise operations, nor of what an implementation computes and drops."""

    bytes_read: int
    bytes_written: int
    flops: int

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes_moved
