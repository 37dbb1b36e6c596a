"""A small text-conditional diffusion model: a UNet whose attention, over the image and to the words, is of the zoo.

Sources: the UNet of Ho et al. 2020 (arXiv 2006.11239) with cross attention to a caption as in Rombach et al. 2022
(arXiv 2112.10752), on patches that became channels; the output is scaled as in Karras et al. 2022 (arXiv 2206.00364,
table 1):

    x0 = a x + b F(c x, lambda, words)

a x is the linear estimate of x0, b the size of what it leaves, and 1 / c that of x, so that what F takes and what it
must give have one size at every lambda. Variance stays 1 (`attnzoo/diffusion`).

Words reach the image by cross attention alone: nothing pooled of them is added elsewhere, so that to hide a word from a
region hides it. A caption without words (all ids below 0) is the unconditional model: cross attention then gives zeros.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.attention.edits import EditRuns
from attnzoo.diffusion import image_part, noise_part
from attnzoo.models.diffusion_blocks import (
    CaptionEncoder,
    Captions,
    ImageAttention,
    ResidualBlock,
    TimeEmbedding,
    group_norm,
)
from attnzoo.models.diffusion_config import DiffusionConfig
from attnzoo.models.diffusion_infusion import Infusion

LayerEdits = Mapping[str, EditRuns]
"""What is read and changed of attention layers, by their names in `DiffusionUNet.attentions`."""


class DiffusionUNet(nn.Module):
    """forward(x_NCHW, half_log_snr_N, words_NL): the image x0 that it sees in x. Pixels lie between -1 and 1."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        widths, time = config.widths, 4 * config.widths[0]
        self.time = TimeEmbedding(time)
        self.text = CaptionEncoder(config)
        inside = config.channels * config.patch**2
        self.first = nn.Conv2d(inside, widths[0], 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        skips, channels = [widths[0]], widths[0]

        def block(out: int, given: int) -> nn.ModuleList:
            return nn.ModuleList([ResidualBlock(given, out, time, config.dropout), ImageAttention(config, out)])

        for level, width in enumerate(widths):
            for _ in range(config.residual_blocks):
                self.down.append(block(width, channels))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.middle = block(channels, channels)
        self.after_middle = ResidualBlock(channels, channels, time, config.dropout)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.residual_blocks + 1):
                self.up.append(block(width, channels + skips.pop()))
                channels = width
            if level:
                self.grow.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.last_norm = group_norm(channels)
        self.last = nn.Conv2d(channels, inside, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(
        self,
        x_NCHW: Tensor,
        half_log_snr_N: Tensor,
        words_NL: Tensor | Captions,
        *,
        edits: LayerEdits | None = None,
        infusion: Infusion | None = None,
    ) -> Tensor:
        """x0_NCHW. words_NL: ids of the caption's words, below 0 where there is none, or what `encode` made of them.
        edits: what is read and changed of attention. infusion: what self-attention does in place of that, for rows in
        two halves. Raises ValueError for shapes that do not fit the configuration."""
        self._check(x_NCHW, half_log_snr_N, words_NL)
        words = words_NL if isinstance(words_NL, Captions) else self.encode(words_NL)
        keep_N, share_N, size_N = self.scales(half_log_snr_N)
        found = self._inside(x_NCHW * size_N, half_log_snr_N, words, edits or {}, infusion)
        return keep_N * x_NCHW + share_N * found

    def encode(self, words_NL: Tensor) -> Captions:
        """Captions for `forward`: the same for all steps."""
        out: Captions = self.text(words_NL)
        return out

    def scales(self, half_log_snr_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and c of the module's formula, [N, 1, 1, 1]."""
        deviation = self.config.data_deviation
        alpha_N, sigma_N = image_part(half_log_snr_N), noise_part(half_log_snr_N)
        total_N = (alpha_N * deviation) ** 2 + sigma_N**2
        found = (alpha_N * deviation**2 / total_N, sigma_N * deviation / total_N.sqrt(), total_N.rsqrt())
        keep, share, size = (part[:, None, None, None] for part in found)
        return keep, share, size

    def _inside(
        self,
        x_NCHW: Tensor,
        half_log_snr_N: Tensor,
        words: Captions,
        edits: LayerEdits,
        infusion: Infusion | None,
    ) -> Tensor:
        time_ND, per = self.time(half_log_snr_N), self.config.residual_blocks

        def run(name: str, block: nn.Module, x_NCHW: Tensor) -> Tensor:
            assert isinstance(block, nn.ModuleList)
            own = (edits.get(f"{name}.self"), edits.get(f"{name}.cross"), infusion)
            out: Tensor = block[1](block[0](x_NCHW, time_ND), words, *own)
            return out

        x = self.first(F.pixel_unshuffle(x_NCHW, self.config.patch))
        skips = [x]
        for number, block in enumerate(self.down):
            x = run(f"down.{number}", block, x)
            skips.append(x)
            level = number // per
            if number % per == per - 1 and level < len(self.shrink):
                x = self.shrink[level](x)
                skips.append(x)
        x = self.after_middle(run("middle", self.middle, x), time_ND)
        for number, block in enumerate(self.up):
            x = run(f"up.{number}", block, torch.cat([x, skips.pop()], 1))
            level = number // (per + 1)
            if number % (per + 1) == per and level < len(self.grow):
                x = self.grow[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.last(F.silu(self.last_norm(x)))
        return F.pixel_shuffle(x, self.config.patch)

    def _check(self, x_NCHW: Tensor, half_log_snr_N: Tensor, words_NL: Tensor | Captions) -> None:
        config, count = self.config, len(x_NCHW)
        image = (count, config.channels, config.image_size, config.image_size)
        if x_NCHW.shape != image:
            raise ValueError(f"x_NCHW has shape {list(x_NCHW.shape)}; it must be {list(image)}")
        if half_log_snr_N.shape != (count,):
            raise ValueError(f"half_log_snr_N has shape {list(half_log_snr_N.shape)}; it must be {[count]}")
        ids = words_NL.exist_NL if isinstance(words_NL, Captions) else words_NL
        if ids.dim() != 2 or len(ids) != count or ids.shape[1] > config.words:
            raise ValueError(f"words_NL has shape {list(ids.shape)}; it must be [{count}, {config.words} at most]")

    def attentions(self) -> dict[str, Attention]:
        """Attention layers of the image by block and kind, such as "down.0.self", in the order of `forward`."""
        blocks = [(f"down.{number}", block) for number, block in enumerate(self.down)]
        blocks += [("middle", self.middle), *((f"up.{number}", block) for number, block in enumerate(self.up))]
        found: dict[str, Attention] = {}
        for name, block in blocks:
            assert isinstance(block, nn.ModuleList)
            attention = block[1]
            assert isinstance(attention, ImageAttention)
            found[f"{name}.self"], found[f"{name}.cross"] = attention.self_attention, attention.cross_attention
        return found

    def side(self, name: str) -> int:
        """Places of a side that the queries of the layer `name` have."""
        block, _, _ = name.rpartition(".")
        where, _, number = block.partition(".")
        levels, per = len(self.config.widths), self.config.residual_blocks
        level = {
            "down": lambda n: n // per,
            "middle": lambda n: levels - 1,
            "up": lambda n: levels - 1 - n // (per + 1),
        }
        return self.config.side(level[where](int(number or 0)))
