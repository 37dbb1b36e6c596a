"""What `row_blocks` holds beyond its inputs and results, in bytes: a group's tensors and its widest block's scores.

Follows the code of `row_blocks` for rows of one document each, q, k and v laid out token by token.
"""

from dataclasses import dataclass

from attnzoo.ops.common import row_blocks
from attnzoo.ops.common.masks import CausalMask

INDEX = 8
"""Bytes of an int64."""


@dataclass(frozen=True, kw_only=True)
class RowBlockSizes:
    """A call: its sizes, bytes of an element and of an element of sums, the mask, and the channels of its table (0: a
    bias alone, None: no relative terms)."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    width: int
    sum_width: int
    mask: CausalMask
    channels: int | None

    def forward(self) -> int:
        """Bytes of temporaries of the forward pass."""
        near, sinks = self._widest()
        values = (near + sinks) * self.head_dim if sinks else 0
        summing = self._pairs() * (self._rows() * (near + sinks + self.head_dim) + values)
        return max(self._held() + max(self._scoring(), self.sum_width * summing), self._loading())

    def backward(self) -> int:
        """Bytes of temporaries of the backward pass, without the gradients themselves."""
        near, sinks = self._widest()
        scores = self._rows() * (near + sinks)
        grads = scores * (2 if sinks else 1)
        product = self.head_dim * near
        if self.channels is not None:
            product = max(product, (self._rows() + self.channels) * (near + 1))
        block = max(self._scoring(), self.sum_width * self._pairs() * (scores + grads + product))
        tokens = self.tokens * self.head_dim
        distances = 0 if self.channels is None else (self.tokens + 1) * (self.channels + 1)
        sums = self.sum_width * self._pairs() * (4 * tokens + distances)
        copied = self.width * self._pairs() * tokens if self._sequences() > 1 else 0
        adding = self.sum_width * (self._pairs() * tokens + 2 * self._together() * self.tokens * (self.channels or 0))
        return sums + copied + max(self._held() + max(block, adding), self._loading())

    def _group(self) -> tuple[int, int]:
        return row_blocks.group_size(self.batch, self.heads, self.tokens, self.mask, self.sum_width)

    def _together(self) -> int:
        return self._group()[0]

    def _sequences(self) -> int:
        return self._group()[1]

    def _pairs(self) -> int:
        return self._together() * self._sequences()

    def _rows(self) -> int:
        return min(row_blocks.BLOCK, self.tokens)

    def _widest(self) -> tuple[int, int]:
        """Keys of the widest block: the near ones, and the sinks before them."""
        if self.mask.window is None:
            return self.tokens, 0
        near = min(self.tokens, self.mask.window - 1 + self._rows())
        return near, min(self.mask.sinks, self.tokens - near)

    def _scoring(self) -> int:
        """Bytes while a block's weights are made: scores of every span, what hides keys, and all spans side by side."""
        near, sinks = self._widest()
        tile = self.sum_width * self._pairs() * self._rows()
        hidden = 2 * self._rows() ** 2
        if self.mask.window is not None:
            hidden = self._rows() * near * (INDEX + 1)
        relative = 0 if self.channels is None else tile * (near + 1)
        together = tile * (near + sinks) if sinks else 0
        return tile * (near + sinks) + max(hidden, relative, together)

    def _held(self) -> int:
        """Bytes of a group's tensors: queries, biased queries, copies of keys and values, the table by distance."""
        rows = self._pairs() * self.tokens * self.head_dim
        total = self.sum_width * rows
        if self.channels is not None:
            distances = self._together() * (self.tokens + 1) * (self.channels + 1)
            repeated = self._pairs() * (self.tokens + 1) * (self.channels + 1) if self._sequences() > 1 else 0
            total += self.sum_width * (rows + distances + repeated)
        if self.width != self.sum_width or self._sequences() > 1 or self.heads != self.kv_heads:
            total += 2 * self.sum_width * rows
        return total

    def _loading(self) -> int:
        """Bytes while the next group is made beside the last one."""
        return 2 * self._held()
