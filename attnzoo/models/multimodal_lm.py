"""A language model that reads pictures: a vision transformer, a projector, and any decoder of the zoo.

Source: Liu et al. 2023, "Visual Instruction Tuning" (LLaVA, arXiv 2304.08485), with the projector of two maps of Liu et
al. 2023, "Improved Baselines with Visual Instruction Tuning" (arXiv 2310.03744).

Every picture takes the places of M placeholders in the text; the decoder reads its M vectors there as if they were
embeddings of tokens. Causality, caches, padding and decoding are the decoder's own.

Differs from the papers: a projector may average patches first (`grid`) and may set the size of its vectors (`output`),
because vectors much smaller than embeddings of words become attention sinks.

Letters: I pictures, P patches and M vectors of a picture, B sequences, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.edits import EditRuns
from attnzoo.models.config import DecoderConfig
from attnzoo.models.decoder_lm import DecoderLM, DecoderState
from attnzoo.models.vit import VisionConfig, ViT
from attnzoo.types import CheckedConfig, build_config

IGNORED = -100
"""A target that does not count."""
SMALL = 0.1
"""The first size of vectors of output="small", in units of the root mean square of the decoder's embeddings."""


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(CheckedConfig):
    """hidden: width between the two maps; None: one map. grid: vectors along a side, each the mean of a part of the
    patches; None: one vector a patch. output: "plain": vectors begin at the size of the decoder's embeddings; "small":
    at a tenth of it; "normalised": they always have it."""

    hidden: int | None = None
    grid: int | None = None
    output: Literal["plain", "small", "normalised"] = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "grid"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"projector.{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What makes vectors of pictures. width: of the decoder's embeddings. unit: their root mean square."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    width: int
    unit: float

    def __post_init__(self) -> None:
        if self.width < 1 or not self.unit > 0:
            raise ValueError(f"width={self.width}, unit={self.unit} must be above 0")
        if self.projector.grid is not None and self.projector.grid > self.vision.side:
            raise ValueError(
                f"projector.grid={self.projector.grid} is more than the {self.vision.side} patches along a side"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PictureConfig":
        """Reads what `to_dict` wrote. Raises ValueError that names the key."""
        parts = {
            "vision": VisionConfig.from_dict(values.get("vision", {})),
            "projector": build_config(ProjectorConfig, values.get("projector", {}), "model.projector"),
        }
        return cls(**{**values, **parts})

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return dataclasses.asdict(self)

    @property
    def tokens(self) -> int:
        """M, the places that a picture takes in a text."""
        return (self.projector.grid or self.vision.side) ** 2


class PictureEncoder(nn.Module):
    """vectors_IMD of pictures, in the decoder's space: tower and projector."""

    def __init__(self, config: PictureConfig) -> None:
        super().__init__()
        self.config = config
        inside, hidden, width = config.vision.model_dim, config.projector.hidden, config.width
        self.vision = ViT(config.vision)
        self.hidden = None if hidden is None else nn.Linear(inside, hidden)
        self.output = nn.Linear(hidden or inside, width)
        self.reset_projector()

    def reset_projector(self) -> None:
        """Initialises the projector from torch's global random state."""
        config = self.config.projector
        # Patches come out of a norm; GELU of unit normals has a root mean square of .65.
        size = self.config.unit * (SMALL if config.output == "small" else 1.0)
        if self.hidden is not None:
            nn.init.normal_(self.hidden.weight, std=self.hidden.in_features**-0.5)
            nn.init.zeros_(self.hidden.bias)
            size /= 0.65
        nn.init.normal_(self.output.weight, std=size * self.output.in_features**-0.5)
        nn.init.zeros_(self.output.bias)

    def matrix_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Weights of linear maps."""
        maps = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        return [(f"{name}.weight", cast(nn.Parameter, module.weight)) for name, module in maps]

    def forward(self, images_ICHW: Tensor) -> Tensor:
        """As `ViT.forward` takes them."""
        return self.project(self.vision(images_ICHW))

    def project(self, patches_IPD: Tensor) -> Tensor:
        """vectors_IMD of what the tower says of the patches."""
        config, side = self.config.projector, self.config.vision.side
        x = patches_IPD
        if config.grid is not None and config.grid != side:
            maps_IDGG = x.mT.unflatten(2, (side, side))
            x = F.adaptive_avg_pool2d(maps_IDGG, config.grid).flatten(2).mT
        if self.hidden is not None:
            x = F.gelu(self.hidden(x))
        out: Tensor = self.output(x)
        return F.rms_norm(out, (out.shape[-1],)) * self.config.unit if config.output == "normalised" else out


class MultimodalLM(nn.Module):
    """A decoder that reads pictures. Wherever a method takes `images`, they are those of all rows in the order of their
    placeholders (`image_token`, M in a row for each picture); None: there are none.

    image_token: the id of the placeholder; by default the first one behind the decoder's vocabulary, which no text has.
    """

    def __init__(self, pictures: PictureEncoder, decoder: DecoderLM, image_token: int | None = None) -> None:
        super().__init__()
        if pictures.config.width != decoder.config.model_dim:
            raise ValueError(
                f"pictures of width {pictures.config.width} do not fit a decoder of model_dim="
                f"{decoder.config.model_dim}"
            )
        self.pictures, self.decoder = pictures, decoder
        self.image_token = decoder.config.vocab_size if image_token is None else image_token

    @classmethod
    def build(
        cls,
        vision: Mapping[str, Any],
        projector: Mapping[str, Any],
        decoder: DecoderConfig,
        image_token: int | None = None,
    ) -> "MultimodalLM":
        """A model with new weights, of the sections of a configuration. Raises ValueError that names the key."""
        lm = DecoderLM(decoder)
        values = {"vision": vision, "projector": projector, "width": decoder.model_dim, "unit": decoder.embedding_size}
        return cls(PictureEncoder(PictureConfig.from_dict(values)), lm, image_token)

    def embed(self, tokens_BT: Tensor, images: Tensor | None = None) -> Tensor:
        """x_BTD, which every method of the decoder takes in place of tokens. Raises ValueError where placeholders and
        pictures do not fit. images may also be vectors_IMD that the encoder has made of them."""
        at_BT = tokens_BT == self.image_token
        if images is None and not bool(at_BT.any()):
            return self.decoder.embed(tokens_BT)
        pictures, tokens = 0 if images is None else len(images), self.pictures.config.tokens
        places = int(at_BT.sum())
        if places != pictures * tokens:
            raise ValueError(
                f"tokens_BT has {places} placeholders (token {self.image_token}) and images has {pictures} pictures; a "
                f"picture takes {tokens} placeholders"
            )
        assert images is not None
        x_BTD = self.decoder.embed(tokens_BT.masked_fill(at_BT, 0))
        vectors_IMD = images if images.dim() == 3 else self.pictures(images)
        return x_BTD.masked_scatter(at_BT[..., None], vectors_IMD.to(x_BTD.dtype))

    def forward(
        self,
        tokens_BT: Tensor,
        images: Tensor | None = None,
        starts_BT: Tensor | None = None,
        *,
        edits: EditRuns | None = None,
    ) -> Tensor:
        """logits_BTV; `starts_BT` and `edits` as in `DecoderLM.forward`."""
        return self.decoder(self.embed(tokens_BT, images), starts_BT, edits=edits)

    def target_logits(
        self, tokens_BT: Tensor, targets_BT: Tensor, images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits [A, V], targets [A]) of the targets that count, row by row; those of -100 cost no logits."""
        known_BT = targets_BT != IGNORED
        hidden_BTD = self.decoder.hidden(self.embed(tokens_BT, images))
        return self.decoder.logits(hidden_BTD[known_BT]), targets_BT[known_BT]

    def init_state(self, batch: int, capacity: int, **options: Any) -> DecoderState:
        """As `DecoderLM.init_state`."""
        return self.decoder.init_state(batch, capacity, **options)

    def extend(
        self,
        tokens_BT: Tensor,
        state: DecoderState,
        counts_B: Tensor | None = None,
        *,
        images: Tensor | None = None,
        edits: EditRuns | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """As `DecoderLM.extend`. A picture's placeholders come in one chunk."""
        return self.decoder.extend(self.embed(tokens_BT, images), state, counts_B, edits=edits)

    def matrix_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Weights of linear maps inside blocks, of tower and decoder, and of the projector."""
        maps = [(f"decoder.{name}", weight) for name, weight in self.decoder.matrix_parameters()]
        return maps + [(f"pictures.{name}", weight) for name, weight in self.pictures.matrix_parameters()]
