"""Compares attnzoo's scores of channels and tokens with kvpress's, on kvpress's queries and keys.

kvpress 0.5.5 takes means over queries, groups and keys where the papers take sums, so that scores agree up to a factor.
Its ThinKPress does not return scores; their order follows from the channels that it sets to zero at each ratio. Its
SnapKVPress smooths only with means, so that kind="max" cannot be compared.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from attnzoo.kvcache.channels import channel_scores
from attnzoo.kvcache.snapkv import smoothed
from attnzoo.ops.accumulated_attention import accumulated_attention
from attnzoo.ops.common.masks import Mask
from scripts.caches.peer import Exchange

WINDOW, POOL = 32, 5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """channels: number in all layers and kv heads; same_rank: number of channels with the same rank. tokens: number of
    token scores; difference: their largest difference, relative to the largest score of the kv head."""

    channels: int
    same_rank: int
    tokens: int
    difference: float


def compare_scores(exchange: Exchange, prompt_1T: Tensor) -> Agreement:
    """Compares the scores in every layer for a prompt. Raises PeerError if kvpress cannot be run."""
    work = {"kind": "scores", "prompt": prompt_1T[0].tolist(), "window": WINDOW, "pool": POOL}
    return agreement(load_file(exchange.run(work, Path("scores.safetensors"))))


def agreement(found: dict[str, Tensor]) -> Agreement:
    """The agreement with kvpress's tensors of each layer: queries_BNWH and keys_BKSH after rotation, rank_BKH (0: the
    channel that is pruned first) and snapkv_BKP, the scores of the tokens before the window."""
    channels = same = tokens = 0
    difference = 0.0
    for layer in range(len(found) // 4):
        queries, keys, rank, snapkv = (found[f"{name}.{layer}"] for name in ("queries", "keys", "rank", "snapkv"))
        mine = channel_ranks(queries, keys)
        channels, same = channels + mine.numel(), same + int((mine == rank).sum())
        ours = snapkv_scores(queries, keys)
        tokens += ours.numel()
        # kvpress takes means over the window's queries and the group's query heads.
        theirs = snapkv * (queries.shape[1] // keys.shape[1] * queries.shape[2])
        apart = (ours - theirs).abs().amax(-1) / ours.amax(-1)
        difference = max(difference, float(apart.max()))
    return Agreement(channels=channels, same_rank=same, tokens=tokens, difference=difference)


def channel_ranks(queries_BNWH: Tensor, keys_BKSH: Tensor) -> Tensor:
    """rank_BKH: the rank of every channel in ascending order of ThinK's scores."""
    held = torch.ones(1, 1, keys_BKSH.shape[2], dtype=torch.bool)
    return channel_scores(queries_BNWH, keys_BKSH, held).argsort(dim=-1, stable=True).argsort(dim=-1)


def snapkv_scores(queries_BNWH: Tensor, keys_BKSH: Tensor, pool: int = POOL) -> Tensor:
    """score_BKP of the tokens before the window, as the policy snapkv computes them."""
    at_S = torch.arange(keys_BKSH.shape[2])
    before = keys_BKSH.shape[2] - queries_BNWH.shape[2]
    mask = Mask(query_positions_BT=at_S[None, before:], key_positions_BKS=at_S[None, None])
    seen = accumulated_attention(queries_BNWH, keys_BKSH, mask=mask).masked_fill(at_S >= before, 0.0)
    return smoothed(seen, pool, "mean")[..., :before]
