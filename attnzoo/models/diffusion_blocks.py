"""What a diffusion model is made of: blocks of convolutions told the time, blocks of attention, the text encoder."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import build_attention
from attnzoo.attention.base import streaming
from attnzoo.attention.edits import EditRuns
from attnzoo.models.blocks import MLP, Block, attended, build_norm
from attnzoo.models.diffusion_config import DiffusionConfig
from attnzoo.models.diffusion_infusion import Infusion
from attnzoo.ops.common.masks import Mask


class TimeEmbedding(nn.Module):
    """What blocks are told of lambda: sines of it at rates from 1/8 to 8 turns over its range, and two layers."""

    def __init__(self, dim: int, waves: int = 16) -> None:
        super().__init__()
        self.rates: Tensor
        self.register_buffer("rates", 2 * math.pi * torch.logspace(-3, 3, waves, base=2.0) / 10, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * waves, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, half_log_snr_N: Tensor) -> Tensor:
        angles = half_log_snr_N[:, None].float() * self.rates.float()
        out: Tensor = self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1).to(half_log_snr_N.dtype))
        return out


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm (arXiv 1803.08494) of at most 8 groups."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm conv(silu(norm x)))), the second norm scaled and shifted by the time (FiLM)."""

    def __init__(self, channels: int, out: int, time: int, dropout: float) -> None:
        super().__init__()
        self.first_norm, self.first = group_norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, 2 * out)
        self.second_norm, self.second = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, x_NCHW: Tensor, time_ND: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.first_norm(x_NCHW)))
        scale, shift = self.time(time_ND)[:, :, None, None].chunk(2, dim=1)
        hidden = F.silu(self.second_norm(hidden) * (1 + scale) + shift)
        out: Tensor = self.skip(x_NCHW) + self.second(self.dropout(hidden))
        return out


class ImageAttention(nn.Module):
    """x + self(norm x), then x + cross(norm x, words), then x + mlp(norm x), over the places of an image."""

    def __init__(self, config: DiffusionConfig, width: int) -> None:
        super().__init__()
        self.self_norm = build_norm("layernorm", width)
        self.self_attention = build_attention(*config.image_attention("attention", width), "model.attention")
        self.cross_norm = build_norm("layernorm", width)
        self.from_words = nn.Linear(config.text_dim, width, bias=False)
        self.cross_attention = build_attention(
            *config.image_attention("cross_attention", width), "model.cross_attention"
        )
        self.mlp_norm = build_norm("layernorm", width)
        self.mlp = MLP("gelu", width, 4 * width, bias=True)

    def forward(
        self,
        x_NCHW: Tensor,
        words: "Captions",
        self_edits: EditRuns | None,
        cross_edits: EditRuns | None,
        infusion: Infusion | None,
    ) -> Tensor:
        x_NTD = x_NCHW.flatten(2).transpose(1, 2)
        normed_NTD = self.self_norm(x_NTD)
        if infusion is None:
            x_NTD = x_NTD + attended(self.self_attention, normed_NTD, Mask.full(), self_edits)
        else:
            x_NTD = x_NTD + infusion.attend(self.self_attention, normed_NTD)
        context_NLD = self.from_words(words.encoded_NLD)
        mask = Mask.full(words.exist_NL)
        x_NTD = x_NTD + attended(self.cross_attention, self.cross_norm(x_NTD), mask, cross_edits, context_NLD)
        x_NTD = x_NTD + self.mlp(self.mlp_norm(x_NTD))
        return x_NTD.transpose(1, 2).reshape(x_NCHW.shape)


class Captions:
    """Captions as the image reads them. encoded_NLD; exist_NL: which words there are."""

    def __init__(self, encoded_NLD: Tensor, exist_NL: Tensor) -> None:
        self.encoded_NLD, self.exist_NL = encoded_NLD, exist_NL


class CaptionEncoder(nn.Module):
    """Captions of captions that have seen one another: embeddings with a vector for each place, and pre-norm blocks."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        dim = config.text_dim
        self.word = nn.Embedding(config.vocab_size, dim)
        self.place = nn.Parameter(torch.empty(config.words, dim))
        blocks = []
        for _ in range(config.text_layers):
            attention = streaming(
                build_attention(*config.image_attention("text_attention", dim), "model.text_attention")
            )
            blocks.append(Block(attention, MLP("gelu", dim, 4 * dim, bias=True), "layernorm", dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = build_norm("layernorm", dim)
        nn.init.normal_(self.word.weight, std=0.5)
        nn.init.normal_(self.place, std=0.1)

    def forward(self, words_NL: Tensor) -> Captions:
        """words_NL: ids, those below 0 are no words. Raises ValueError for ids that are not of the vocabulary."""
        exist_NL = words_NL >= 0
        try:
            x_NLD = self.word(words_NL.clamp(min=0))
        except IndexError:
            known = self.word.num_embeddings
            raise ValueError(f"words_NL holds id {int(words_NL.max())}; vocab_size={known}") from None
        x_NLD = x_NLD + self.place[: words_NL.shape[1]]
        for block in self.blocks:
            x_NLD = block(x_NLD, Mask.full(exist_NL))
        return Captions(self.norm(x_NLD), exist_NL)
