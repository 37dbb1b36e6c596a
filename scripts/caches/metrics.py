"""Compares the logits of a model with a compressed cache and with the full cache, over the same tokens."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """kl_mean, kl_p99: KL(full || compressed) in nats per token, mean and 99th percentile. agreement: fraction of
    tokens with the same most likely next token. perplexity: of the text with the compressed cache; full_perplexity:
    with the full cache."""

    kl_mean: float
    kl_p99: float
    agreement: float
    perplexity: float
    full_perplexity: float


def kl_divergence(full_BTV: Tensor, compressed_BTV: Tensor) -> Tensor:
    """KL(full || compressed) in nats, float64 [B, T], from logits."""
    full = F.log_softmax(full_BTV.double(), dim=-1)
    compressed = F.log_softmax(compressed_BTV.double(), dim=-1)
    return (full.exp() * (full - compressed)).sum(-1).clamp_min(0.0)


class FidelityMeter:
    """Collects batches of logits; `result` is over all their tokens."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._nats: list[Tensor] = []
        self._full_nats: list[Tensor] = []

    def add(self, full_BTV: Tensor, compressed_BTV: Tensor, targets_BT: Tensor) -> None:
        """Adds the logits of the same tokens with both caches, and the tokens that follow in the text."""
        self._kl.append(kl_divergence(full_BTV, compressed_BTV).flatten())
        self._same.append((full_BTV.argmax(-1) == compressed_BTV.argmax(-1)).flatten().double())
        self._nats.append(_nats(compressed_BTV, targets_BT))
        self._full_nats.append(_nats(full_BTV, targets_BT))

    def result(self) -> Fidelity:
        """The result. Raises ValueError if nothing was added."""
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
