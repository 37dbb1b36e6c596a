"""A vision transformer of the zoo's attention: patches of pictures become vectors that see each other.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv 2010.11929), and the picture tower of Radford et
al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020).

Differs from the papers: no class token unless asked for, and no classification head; what is returned are the patches.

Letters: I pictures, C channels, G patches along a side, P = G * G patches of a picture, p pixels of a patch's side.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from attnzoo.attention import build_attention
from attnzoo.attention.base import StreamingAttention
from attnzoo.models.blocks import MLP, Block, build_norm
from attnzoo.models.config import attention_options
from attnzoo.ops.common.masks import Mask
from attnzoo.types import CheckedConfig, build_config


@dataclass(frozen=True, kw_only=True)
class VisionConfig(CheckedConfig):
    """Sizes and choices of a `ViT`.

    image_size, patch_size: pixels of a side. channels: numbers of a pixel. attention: any variant that takes full
    masks, a name or a mapping with `kind: <name>` and its options. norm, mlp: their kinds. mlp_dim: None means 4 *
    model_dim. patch_bias, mlp_bias: whether these maps have biases. class_token: whether a learned token stands before
    the patches; it is not returned. input_norm: a norm before the blocks; final_norm: one after them. mean, std: by
    which channels of 8-bit pictures are standardised once they are divided by 255.
    """

    image_size: int = 64
    patch_size: int = 8
    channels: int = 3
    model_dim: int = 192
    num_layers: int = 4
    attention: str | dict = field(default_factory=lambda: {"kind": "mha", "num_heads": 6, "position": "none"})
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_eps: float = 1e-5
    mlp: Literal["swiglu", "gelu", "quick_gelu", "relu"] = "gelu"
    mlp_dim: int | None = None
    mlp_bias: bool = True
    patch_bias: bool = True
    class_token: bool = False
    input_norm: bool = False
    final_norm: bool = True
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "patch_size", "channels", "model_dim", "num_layers", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"vision.{name}={value} must be at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                "pictures are cut into whole patches"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"vision.{name}={getattr(self, name)} needs {self.channels} numbers, one a channel")
        if min(self.std) <= 0:
            raise ValueError(f"vision.std={self.std} must be above 0")
        self.attention_options()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VisionConfig":
        """Reads what `to_dict` wrote. Raises ValueError for unknown keys and sizes that do not fit."""
        return build_config(cls, values, "model.vision")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return dataclasses.asdict(self)

    def attention_options(self) -> tuple[str, dict[str, Any]]:
        """(kind, options) of the variant, model_dim and the longest distance filled in."""
        tokens = self.patches + self.class_token
        return attention_options(
            self.attention, "model.vision.attention", model_dim=self.model_dim, max_distance=tokens
        )

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return self.side**2


class ViT(nn.Module):
    """patches_IPD of pictures, row by row from the top left."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.model_dim, config.norm_eps
        self.patch = nn.Linear(config.channels * config.patch_size**2, dim, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(dim)) if config.class_token else None
        self.position = nn.Parameter(torch.empty(config.patches + config.class_token, dim))
        self.input_norm = build_norm(config.norm, dim, eps) if config.input_norm else nn.Identity()
        self.blocks = nn.ModuleList(self._block() for _ in range(config.num_layers))
        self.norm = build_norm(config.norm, dim, eps) if config.final_norm else nn.Identity()
        self.reset_parameters()

    def _block(self) -> Block:
        config, (kind, options) = self.config, self.config.attention_options()
        attention = build_attention(kind, options, "model.vision.attention")
        if "full" not in attention.traits.masks:
            raise ValueError(
                f"model.vision.attention: {kind!r} hides later tokens, and patches see each other; take a variant "
                "with full masks, such as mha"
            )
        mlp = MLP(config.mlp, config.model_dim, config.mlp_dim or 4 * config.model_dim, config.mlp_bias)
        # A block's forward asks nothing of a variant that streaming ones alone have.
        return Block(cast(StreamingAttention, attention), mlp, config.norm, config.model_dim, config.norm_eps)

    def reset_parameters(self) -> None:
        """Initialises all weights from torch's global random state."""
        std = 0.02
        nn.init.normal_(self.patch.weight, std=self.patch.in_features**-0.5)
        if self.patch.bias is not None:
            nn.init.zeros_(self.patch.bias)
        for parameter in (self.class_token, self.position):
            if parameter is not None:
                nn.init.normal_(parameter, std=std)
        for block in cast(list[Block], list(self.blocks)):
            block.attention.reset_parameters(std, std / (2 * self.config.num_layers) ** 0.5)
            block.mlp.reset_parameters(std, std / (2 * self.config.num_layers) ** 0.5)

    def forward(self, images_ICHW: Tensor) -> Tensor:
        """images: 8-bit, or floating-point numbers that have been standardised. Raises ValueError for other sizes."""
        config = self.config
        size = (config.channels, config.image_size, config.image_size)
        if images_ICHW.dim() != 4 or tuple(images_ICHW.shape[1:]) != size:
            raise ValueError(
                f"images have shape {tuple(images_ICHW.shape)}; give {size[0]} channels of {size[1]} x {size[2]} "
                "pixels each: [pictures, channels, height, width]"
            )
        x_ITD = self.patch(self._cut(standardised(images_ICHW, config.mean, config.std, self.patch.weight.dtype)))
        if self.class_token is not None:
            x_ITD = torch.cat([self.class_token.expand(len(x_ITD), 1, -1), x_ITD], dim=1)
        x_ITD = self.input_norm(x_ITD + self.position)
        for block in self.blocks:
            x_ITD = block(x_ITD, Mask.full())
        if self.class_token is not None:
            x_ITD = x_ITD[:, 1:]
        out: Tensor = self.norm(x_ITD)
        return out

    def _cut(self, images_ICHW: Tensor) -> Tensor:
        """[I, P, C * p * p], a patch's numbers in the order of a convolution's kernel."""
        side, patch = self.config.side, self.config.patch_size
        cut = images_ICHW.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # [I, C, G, p, G, p]
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def standardised(images_ICHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """8-bit pictures as numbers near 0; floating-point ones as they are. Raises ValueError for other types."""
    if images_ICHW.is_floating_point():
        return images_ICHW.to(dtype)
    if images_ICHW.dtype != torch.uint8:
        raise ValueError(f"images are of {images_ICHW.dtype}; give 8-bit pictures (uint8), or standardised floats")
    mean_C11, std_C11 = (torch.tensor(x, dtype=dtype, device=images_ICHW.device)[:, None, None] for x in (mean, std))
    return (images_ICHW.to(dtype) / 255 - mean_C11) / std_C11
