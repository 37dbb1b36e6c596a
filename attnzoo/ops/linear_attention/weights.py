"""How tokens are cut into chunks, and the weight of each earlier token for each later one.

With a decay g per kv head, inside a chunk a key at distance d has weight g^d, the memory at the chunk's start has
weight g^(t+1) for the chunk's t-th query, and a key of age a at the chunk's end enters the memory with weight g^a. All
exponents are at least 0, so nothing overflows, and g = 0 is allowed; the slopes d/dg are d * g^(d-1). Weights across a
document's start are zero, and padding (which is zero) does not decay anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.common.negligible import without_negligible
from attnzoo.types import accumulation_dtype

CHUNK = 64
BLOCK_BYTES = 1 << 20
"""Bytes of a block's q: with k, v, scores and memories it stays in the cache."""
LEAST_CHUNKS = 4
"""Fewest chunks in a block, so that the memories kept for the backward stay small beside q, k and v."""


def tokens_per_block(batch: int, width: int, dtype: torch.dtype) -> int:
    """Tokens whose queries, of `width` numbers, are worked on at once: whole chunks."""
    chunk_bytes = max(1, batch * width * dtype.itemsize) * CHUNK
    return max(LEAST_CHUNKS, BLOCK_BYTES // chunk_bytes) * CHUNK


@dataclass(frozen=True)
class Weights:
    """Weights of the chunks of one block. Shapes broadcast to [B, K, chunks, ...]; None: all ones.

    inside: [1, K or 1, 1, 1, C, C], causal; hidden: bool [B, 1, chunks, 1, C, C], other documents; carry: [.., G or 1,
    C, 1]; age: [.., C, 1]; kept: [.., 1, 1]; slopes: derivatives of inside, carry, age and kept by the decay.
    """

    chunk: int
    inside: Tensor | None
    hidden: Tensor | None
    carry: Tensor | None
    age: Tensor | None
    kept: Tensor | None
    slopes: tuple[Tensor, Tensor, Tensor, Tensor] | None

    def inside_(self, scores: Tensor) -> Tensor:
        """Multiplies scores [B, K, chunks, G * C, C] by their weights, in place."""
        by_head = scores.unflatten(3, (-1, self.chunk))
        if self.inside is None:
            by_head.tril_()
        else:
            by_head *= self.inside
        if self.hidden is not None:
            by_head.masked_fill_(self.hidden, 0.0)
        return scores

    def carried(self, x: Tensor) -> Tensor:
        """Rows [B, K, chunks, G * C, H], weighted for products with the memory at the chunk's start."""
        if self.carry is None:
            return x
        return (x.unflatten(3, (-1, self.chunk)) * self.carry).flatten(3, 4)

    def aged(self, x: Tensor) -> Tensor:
        """Rows [B, K, chunks, C, H], weighted as they enter the memory at the chunk's end."""
        return x if self.age is None else x * self.age

    def add_slopes_(self, ddecay_K: Tensor, inside: Tensor, carry: Tensor, age: Tensor, kept: Tensor) -> None:
        """Adds the decay's gradient, given each weight's gradient before it is summed over elements that share it."""
        assert self.slopes is not None
        inside = inside.unflatten(3, (-1, self.chunk))
        if self.hidden is not None:
            inside = inside.masked_fill(self.hidden, 0.0)
        by_weight = (
            inside.sum((0, 2, 3), keepdim=True),
            carry.sum(-1, keepdim=True).unflatten(3, (-1, self.chunk)),
            age.sum(-1, keepdim=True),
            kept.sum((-1, -2), keepdim=True),
        )
        for gradient, slope in zip(by_weight, self.slopes, strict=True):
            ddecay_K += (gradient * slope).transpose(0, 1).flatten(1).sum(1)


@dataclass(frozen=True)
class Work:
    """One call: its sizes, and the inputs that weights depend on."""

    batch: int
    kv_heads: int
    tokens: int
    chunk: int
    chunks_per_block: int
    dtype: torch.dtype
    decay_K: Tensor | None
    counts_B: Tensor | None
    starts_BT: Tensor | None
    steps_C: Tensor
    known: dict[tuple[int, bool], Weights] = field(default_factory=dict)

    @staticmethod
    def of(
        q_BNTH: Tensor, k_BKTH: Tensor, decay_K: Tensor | None, counts_B: Tensor | None, starts_BT: Tensor | None
    ) -> "Work":
        batch, heads, tokens, head_dim = q_BNTH.shape
        dtype = accumulation_dtype(q_BNTH.dtype)
        chunk = min(CHUNK, tokens)
        return Work(
            batch=batch,
            kv_heads=k_BKTH.shape[1],
            tokens=tokens,
            chunk=chunk,
            chunks_per_block=tokens_per_block(batch, heads * head_dim, dtype) // CHUNK,
            dtype=dtype,
            decay_K=None if decay_K is None else decay_K.to(dtype),
            counts_B=counts_B,
            starts_BT=starts_BT,
            steps_C=torch.arange(chunk, device=q_BNTH.device),
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(start, end) in tokens."""
        size = self.chunk * self.chunks_per_block
        for start in range(0, self.tokens, size):
            yield start, min(start + size, self.tokens)

    def masked(self, x_BNTH: Tensor, start: int, padding: float) -> Tensor:
        """Tokens from `start` on, with `padding` where a row has none."""
        if self.counts_B is None:
            return x_BNTH
        index_T = torch.arange(start, start + x_BNTH.shape[2], device=x_BNTH.device)
        # masked_fill, not a product: a padded row may hold anything, and 0 * inf is not 0.
        return x_BNTH.masked_fill((index_T >= self.counts_B[:, None])[:, None, :, None], padding)

    def weights(self, start: int, end: int, slopes: bool = False) -> Weights:
        """The weights of the block of tokens start..end; blocks of one length share them where no row differs."""
        if self.counts_B is not None or self.starts_BT is not None:
            return self._weights(start, end, slopes)
        key = (end - start, slopes)
        if key not in self.known:
            self.known[key] = self._weights(start, end, slopes)
        return self.known[key]

    def _weights(self, start: int, end: int, slopes: bool) -> Weights:
        first_n = torch.arange(start, end, self.chunk, device=self.steps_C.device)
        hidden, masks = self._documents(start, end, first_n)
        if self.decay_K is None:
            carry, age, kept = (None if mask is None else mask.to(self.dtype)[:, None] for mask in masks)
            return Weights(self.chunk, None, hidden, carry, age, kept, None)
        steps_C = self.steps_C
        ends_Bn = (first_n + self.chunk).clamp(max=self.tokens)[None]
        if self.counts_B is not None:
            ends_Bn = torch.minimum(ends_Bn, self.counts_B[:, None])
        length_Bn = (ends_Bn - first_n).clamp(min=0)
        distance_CC = steps_C[:, None] - steps_C
        powers = (
            (distance_CC[None, None, None], (distance_CC >= 0)[None, None, None]),
            ((steps_C + 1)[None, None, None, :, None], masks[0]),
            ((length_Bn[..., None] - 1 - steps_C)[..., None], masks[1]),
            (length_Bn[..., None, None], masks[2]),
        )
        inside, carry, age, kept = (self._powers(exponent, mask, 0) for exponent, mask in powers)
        by_decay = None
        if slopes:
            first, second, third, fourth = (self._powers(exponent, mask, 1) for exponent, mask in powers)
            by_decay = (first, second, third, fourth)
        return Weights(self.chunk, inside, hidden, carry, age, kept, by_decay)

    def _powers(self, exponent: Tensor, mask: Tensor | None, derivative: int) -> Tensor:
        """[B, K, ...]: decay^exponent or its derivative, zero outside of the mask."""
        assert self.decay_K is not None
        exponent = exponent[:, None].clamp(min=0)
        decay = self.decay_K.view(1, -1, *[1] * (exponent.dim() - 2))
        power = without_negligible(decay ** (exponent - derivative).clamp(min=0).to(self.dtype))
        if derivative:
            power = power * exponent
        return power if mask is None else power * mask[:, None]

    def _documents(self, start: int, end: int, first_n: Tensor) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """(hidden, (carry, age, kept)): what the starts of documents cut."""
        if self.starts_BT is None:
            return None, (None, None, None)
        starts_BnC = F.pad(self.starts_BT[:, start:end], (0, len(first_n) * self.chunk - (end - start)), value=end)
        starts_BnC = starts_BnC.view(self.batch, len(first_n), self.chunk)
        keys_nC = first_n[:, None] + self.steps_C
        hidden = (keys_nC[:, None] < starts_BnC[..., None])[:, None, :, None]
        last_Bn1 = self.starts_BT[:, (first_n + self.chunk).clamp(max=self.tokens) - 1][..., None]
        carry = (starts_BnC < first_n[:, None])[:, :, None, :, None]
        age = (keys_nC >= last_Bn1)[..., None]
        kept = (last_Bn1 < first_n[:, None])[..., None]
        return hidden, (carry, age, kept)


def chunks_of(x_BNTH: Tensor, work: Work, start: int, padding: float = 0.0) -> Tensor:
    """A block [B, N, t, H] as [B, K, chunks, G * C, H], contiguous; positions without a real token become `padding`."""
    batch, heads, tokens, width = x_BNTH.shape
    x = work.masked(x_BNTH.to(work.dtype), start, padding)
    missing = -tokens % work.chunk
    if missing:
        x = F.pad(x, (0, 0, 0, missing), value=padding)
    x = x.reshape(batch, work.kv_heads, heads // work.kv_heads, -1, work.chunk, width)
    return x.transpose(2, 3).reshape(batch, work.kv_heads, -1, heads // work.kv_heads * work.chunk, width).contiguous()


def tokens_of(x: Tensor, work: Work, tokens: int) -> Tensor:
    """The inverse of `chunks_of`: [B, N, tokens, H]."""
    x = x.unflatten(3, (-1, work.chunk)).transpose(2, 3)
    return x.reshape(work.batch, -1, x.shape[3] * work.chunk, x.shape[-1])[:, :, :tokens]
