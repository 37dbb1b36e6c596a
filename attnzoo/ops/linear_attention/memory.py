"""Bytes that the chunked form of linear attention holds beyond its inputs and results. Follows the code of `torch.py`.

Letters: Q, K, V and O are a block's parts of q, k, v and o, S its scores, M the memories of its chunks.
"""

from dataclasses import dataclass

from attnzoo.ops.linear_attention.weights import BLOCK_BYTES, CHUNK, LEAST_CHUNKS


@dataclass(frozen=True, kw_only=True)
class LinearSizes:
    """A call: its sizes, bytes of an element and of an element of sums, and which options are on."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    sum_width: int
    normalise: bool
    decay: bool

    @property
    def value_dim(self) -> int:
        """Channels of values, the normaliser's one included."""
        return self.head_dim + int(self.normalise)

    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.tokens // self._block_tokens())

    def kept(self) -> int:
        """Bytes kept for the backward pass beside q, k, v and o: one memory per block, and the normaliser's sums."""
        totals = self.batch * self.heads * self.tokens * self.sum_width if self.normalise else 0
        return self.blocks() * self._memory() + totals

    def forward(self) -> int:
        """Bytes of temporaries of the forward pass: the list of memories is copied in the end."""
        q, k, v, o, scores, memories = self._block()
        aged = k if self.decay else 0
        inner = max(
            aged + memories,
            2 * memories,
            memories + scores + o,
            memories + o + (q if self.decay else 0),
        )
        outer = o + (q if self.normalise else 0)
        inputs = q + k + v
        # Tensors of the last block stay until they are replaced.
        again, last = (inputs, outer) if self.blocks() > 1 else (0, 0)
        loading = again + last + inputs + self._padded()
        ending = inputs + outer + self.blocks() * self._memory()
        return max(loading, inputs + last + inner, ending) + 2 * self._memory() + self._weights(1)

    def backward(self) -> int:
        """Bytes of temporaries of the backward pass; the peak is where a learned decay gets its gradient."""
        q, k, v, o, scores, memories = self._block()
        inputs = q + k + v
        # o in chunks is a view where there is one block and query heads do not share kv heads.
        grouped = q if self.normalise and (self.heads != self.kv_heads or self.blocks() > 1) else 0
        given = o + grouped
        aged, carried = (k, q) if self.decay else (0, 0)
        products = 2 * memories + 2 * scores + q + k + aged
        slopes = scores + q + k + memories + 3 * self._powers() if self.decay else 0
        results = carried + (k if self.decay else 0) + v
        inner = products + max(slopes, results)
        again = inputs if self.blocks() > 1 else 0  # the last block's gradients, until they are replaced
        loading = 2 * again + inputs + self._padded() + 2 * o + q
        return max(inputs + given + again + inner, loading) + 3 * self._memory() + self._weights(2)

    def _block_tokens(self) -> int:
        chunk = min(CHUNK, self.tokens)
        row = max(1, self.batch * self.heads * self.head_dim * self.sum_width)
        return chunk * max(LEAST_CHUNKS, BLOCK_BYTES // (row * chunk))

    def _block(self) -> tuple[int, int, int, int, int, int]:
        """Bytes of Q, K, V, O, S and M."""
        chunk = min(CHUNK, self.tokens)
        chunks = -(-min(self._block_tokens(), self.tokens) // chunk)
        rows = self.batch * chunks * chunk * self.sum_width
        return (
            rows * self.heads * self.head_dim,
            rows * self.kv_heads * self.head_dim,
            rows * self.kv_heads * self.value_dim,
            rows * self.heads * self.value_dim,
            rows * self.heads * chunk,
            self.batch * chunks * self.kv_heads * self.head_dim * self.value_dim * self.sum_width,
        )

    def _memory(self) -> int:
        return self.batch * self.kv_heads * self.head_dim * self.value_dim * self.sum_width

    def _padded(self) -> int:
        return self._block()[2] if self.normalise else 0

    def _weights(self, kinds: int) -> int:
        """Powers of the decay, and their slopes."""
        return kinds * self._powers() if self.decay else 0

    def _powers(self) -> int:
        chunk = min(CHUNK, self.tokens)
        return self.kv_heads * chunk * (chunk + 2) * self.sum_width
