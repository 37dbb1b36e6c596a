"""How far a compressed cache moves what a model says: numbers of two series of logits over the same tokens."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """kl_mean, kl_p99: KL(full || compressed) in nats a token, mean and 99th percentile over all tokens; agreement:
    share of tokens whose most likely successor is the same; perplexity: of the text under the compressed cache;
    full_perplexity: under the full one."""

    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity: float
    full_perplexity: float


def kl_divergence(full_BTV: Tensor, compressed_BTV: Tensor) -> Tensor:
    """KL(full || compressed)_BT in nats from logits, in float64."""
    full = F.log_softmax(full_BTV.double(), dim=-1)
    compressed = F.log_softmax(compressed_BTV.double(), dim=-1)
    return (full.exp() * (full - compressed)).sum(-1).clamp_min(0.0)


class FidelityMeter:
    """Gathers batches of logits over the same texts; `result` is over all their tokens."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._nats: list[Tensor] = []
        self._full_nats: list[Tensor] = []

    def add(self, full_BTV: Tensor, compressed_BTV: Tensor, targets_BT: Tensor) -> None:
        """logits of the same tokens under both caches, and the tokens that really follow."""
        self._kl.append(kl_divergence(full_BTV, compressed_BTV).flatten())
        self._same.append((full_BTV.argmax(-1) == compressed_BTV.argmax(-1)).flatten().double())
        self._nats.append(_nats(compressed_BTV, targets_BT))
        self._full_nats.append(_nats(full_BTV, targets_BT))

    def result(self) -> Fidelity:
        """Raises ValueError when nothing was added."""
        if not self._kl:
            raise ValueError("no tokens were measured; add at least one batch")
        kl_N = torch.cat(self._kl)
        return Fidelity(
            kl_mean=float(kl_N.mean()),
            kl_p99=float(kl_N.quantile(0.99)),
            agreement=float(torch.cat(self._same).mean()),
            perplexity=math.exp(float(torch.cat(self._nats).mean())),
            full_perplexity=math.exp(float(torch.cat(self._full_nats).mean())),
        )


def _nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).double(), targets_BT.flatten(), reduction="none")
