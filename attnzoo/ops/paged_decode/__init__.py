"""Attention of one or a few queries over a compressed cache: a prefix whose entries may lack channels, and a tail.

o_i = sum_j softmax_j(q_i[c] . k_j[c] / sqrt(H) + bias_ij + log p_j) v_j over both segments in one softmax, where c are
the channels that the segment of j keeps and the scale uses the full H (ThinK, Xu et al., arXiv 2407.21018, section
3.3); with log p_j, a merged entry counts as the p_j tokens it stands for (KeepKV, arXiv 2504.09936). bias_ij holds the
terms of relative attention, which depend on logical positions and use all channels.
"""

from torch import Tensor

from attnzoo.ops.common.impl import Impl, choose, lazily
from attnzoo.ops.paged_decode.entries import Decoded, Entries
from attnzoo.ops.paged_decode.reference import paged_decode_reference
from attnzoo.ops.paged_decode.torch import paged_decode_torch

IMPLEMENTATIONS = {
    "reference": paged_decode_reference,
    "torch": paged_decode_torch,
    "triton": lazily("attnzoo.ops.paged_decode.triton", "paged_decode_triton"),
}


def paged_decode(
    q_BNTH: Tensor,
    prefix: Entries | None,
    tail: Entries,
    *,
    query_positions_BT: Tensor,
    bias_BNTS: Tensor | None = None,
    probe_BKC: Tensor | None = None,
    accumulated_attention: bool = False,
    impl: Impl = "auto",
) -> Decoded:
    """Attends to every entry at a position in 0..query position; S runs over the slots of the prefix, then the tail's.

    bias_BNTS: added to the logits, already scaled. probe_BKC: one more row per kv head (in the prefix's channels),
    whose products with the prefix's keys are `Decoded.dots_BKP`. accumulated_attention: also `Decoded.accumulated_BKS`.
    A query that sees no entry gets zeros. No gradients. Raises ValueError when shapes do not fit, for a probe without a
    prefix, or for an `impl` that is unknown or cannot run here.
    """
    _check(q_BNTH, prefix, tail, query_positions_BT, bias_BNTS, probe_BKC)
    run = choose("paged_decode", impl, IMPLEMENTATIONS, q_BNTH)
    if run is not paged_decode_torch:
        prefix, tail = None if prefix is None else prefix.placed(), tail.placed()
    out: Decoded = run(q_BNTH, prefix, tail, query_positions_BT, bias_BNTS, probe_BKC, accumulated_attention)
    return out


def _check(
    q_BNTH: Tensor,
    prefix: Entries | None,
    tail: Entries,
    query_positions_BT: Tensor,
    bias_BNTS: Tensor | None,
    probe_BKC: Tensor | None,
) -> None:
    batch, heads, tokens, head_dim = q_BNTH.shape
    for name, part in (("prefix", prefix), ("tail", tail)):
        if part is not None:
            _check_entries(name, part, batch, heads, head_dim)
    if query_positions_BT.shape != (batch, tokens):
        raise ValueError(f"query_positions_BT {tuple(query_positions_BT.shape)} must be [{batch}, {tokens}]")
    slots = tail.slots + (0 if prefix is None else prefix.slots)
    if bias_BNTS is not None and bias_BNTS.shape != (batch, heads, tokens, slots):
        raise ValueError(f"bias_BNTS {tuple(bias_BNTS.shape)} must be {(batch, heads, tokens, slots)}")
    if probe_BKC is not None:
        if prefix is None:
            raise ValueError("probe_BKC meets the prefix's keys, and there is no prefix: leave it out")
        expected = (*prefix.keys_BKSC.shape[:2], prefix.keys_BKSC.shape[3])
        if probe_BKC.shape != expected:
            raise ValueError(f"probe_BKC {tuple(probe_BKC.shape)} must be {expected}, in the prefix's channels")


def _check_entries(name: str, part: Entries, batch: int, heads: int, head_dim: int) -> None:
    keys, values = tuple(part.keys_BKSC.shape), tuple(part.values_BKSV.shape)
    if len(keys) != 4 or keys[0] != batch or keys[:3] != values[:3] or heads % keys[1]:
        raise ValueError(f"{name}: keys {keys} and values {values} do not fit {batch} rows of {heads} query heads")
    positions = None if part.positions_BKS is None else tuple(part.positions_BKS.shape)
    if positions is not None and positions not in ((batch, 1, keys[2]), (batch, keys[1], keys[2])):
        raise ValueError(f"{name}: positions {positions} must be [B, K or 1, S] of keys {keys}")
    for what, width, channels in (
        ("keys", keys[3], part.channels_BKC),
        ("values", values[3], part.value_channels_BKV),
    ):
        if channels is None and width != head_dim:
            raise ValueError(f"{name}: {what} have {width} channels, queries {head_dim}; say which channels they are")
        if channels is not None and channels.shape != (batch, keys[1], width):
            raise ValueError(f"{name}: channels {tuple(channels.shape)} of {what} must be {(batch, keys[1], width)}")
    if part.log_counts_BKS is not None and part.log_counts_BKS.shape != keys[:3]:
        raise ValueError(f"{name}: log_counts_BKS {tuple(part.log_counts_BKS.shape)} must be {keys[:3]}")


__all__ = ["Decoded", "Entries", "paged_decode"]
