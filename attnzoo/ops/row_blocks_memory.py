"""What `row_blocks` holds beyond its inputs and results, in bytes: one head's tensors and the widest block's scores.

Follows the code of `row_blocks` for rows of one document each.
"""

from dataclasses import dataclass

from attnzoo.ops import row_blocks
from attnzoo.ops.masks import CausalMask

INDEX = 8
"""Bytes of an int64."""


@dataclass(frozen=True, kw_only=True)
class RowBlockSizes:
    """A call: its sizes, bytes of an element and of an element of sums, the mask, and whether it reads tables."""

    tokens: int
    head_dim: int
    width: int
    sum_width: int
    mask: CausalMask
    tables: bool

    def forward(self) -> int:
        """Bytes of temporaries of the forward pass."""
        near, sinks = self._widest()
        values = (near + sinks) * self.head_dim * self.sum_width if sinks else 0
        block = max(self._scoring(), self.sum_width * self._rows() * (near + sinks + self.head_dim) + values)
        return max(self._head() + block, 2 * self._head())

    def backward(self) -> int:
        """Bytes of temporaries of the backward pass, without the gradients themselves."""
        near, sinks = self._widest()
        scores = self._rows() * (near + sinks)
        gradients = (self._products() if self.tables else 0) + (scores if sinks or not self.tables else 0)
        block = max(self._scoring(), self.sum_width * (scores + gradients))
        distances = (self.tokens + 1) * (self.head_dim + 1) if self.tables else 0
        sums = self.sum_width * (4 * self.tokens * self.head_dim + distances)
        return sums + max(self._head() + block, 2 * self._head())

    def _rows(self) -> int:
        return min(row_blocks.BLOCK, self.tokens)

    def _widest(self) -> tuple[int, int]:
        """Keys of the widest block: the near ones, and the sinks before them."""
        if self.mask.window is None:
            return self.tokens, 0
        near = min(self.tokens, self.mask.window - 1 + self._rows())
        return near, min(self.mask.sinks, self.tokens - near)

    def _products(self) -> int:
        """Elements of the buffers in which queries meet the table, one for each span of keys."""
        near, sinks = self._widest()
        return self._rows() * (near + 1 + (sinks + self._rows() - 1 if sinks else 0))

    def _scoring(self) -> int:
        """Bytes while a block's weights are made: scores of every span, what hides keys, and all spans side by side."""
        near, sinks = self._widest()
        rows = self._rows()
        scores = self.sum_width * (self._products() if self.tables else rows * (near + sinks))
        hidden = 2 * rows * rows
        if self.mask.window is not None:
            hidden = rows * near * (INDEX + 1)
        together = self.sum_width * rows * (near + sinks) if sinks else 0
        return scores + max(hidden, together)

    def _head(self) -> int:
        """Bytes of one query head's tensors in the dtype of sums: queries, biased queries, the table by distance."""
        rows = self.tokens * self.head_dim
        total = self.sum_width * rows
        if self.tables:
            total += self.sum_width * (rows + (self.tokens + 1) * (self.head_dim + 1)) + INDEX * self.tokens
        if self.width != self.sum_width:
            total += 2 * self.sum_width * rows  # keys and values are copied
        return total
