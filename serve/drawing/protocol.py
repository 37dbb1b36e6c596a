"""The requests of POST /v1/images/generations and /v1/images/compose.

The first has OpenAI's fields where they fit. A field that this server does not support is refused by name unless it has
its neutral value; none is ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from attnzoo.vision.compose import ComposeOptions
from serve.openai.errors import ApiError
from serve.openai.invalid import Where, validated
from serve.openai.json_body import MOST, read_object
from serve.openai.neutral import Values, take_neutral
from serve.openai.protocol import Count, Label, Strict

STEPS, GUIDANCE = 20, 3.0
"""Of a picture whose request does not say."""
MAX_PLACE, MAX_SIDE = 4096, 1024
"""Of a region: how far from the corner of the picture it may be, and how large, in pixels."""
NEUTRAL: Mapping[str, Values] = {
    "background": (None, "auto", "opaque"),
    "input_fidelity": (None,),
    "mask": (None,),
    "moderation": (None, "auto"),
    "negative_prompt": (None, ""),
    "output_compression": (None, 100),
    "output_format": (None, "png"),
    "partial_images": (None, 0),
    "quality": (None, "auto", "standard"),
    "style": (None,),
}
"""OpenAI's fields of pictures, and one of other servers."""
NEUTRAL_OF_COMPOSE: Mapping[str, Values] = {
    **{name: values for name, values in NEUTRAL.items() if name != "background"},
    "n": (None, 1),
    "seed": (None,),
}
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
Place = Annotated[int, Field(ge=-MAX_PLACE, le=MAX_PLACE)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class PictureRequest(Strict):
    """What both requests have. size: that of the model, or "auto". stream: send what happens step by step, with
    preview_every a small picture after every so many steps."""

    model: str
    prompt: Label
    steps: Count | None = None
    size: Label | None = None
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = None
    preview_every: Count | None = None
    user: Label | None = None

    def check(self) -> None:
        """Raises ApiError for fields that contradict one another."""
        if self.preview_every is not None and not self.stream:
            raise ApiError(400, "preview_every is only allowed with stream=true", param="preview_every")


class ImageRequest(PictureRequest):
    """Body of POST /v1/images/generations. seed: of the first picture; those after it have the numbers after it."""

    n: Count | None = None
    seed: Annotated[int, Field(ge=0, le=MOST)] | None = None
    guidance_scale: Scale | None = None


class Region(Strict):
    """Where the object comes, in pixels of the background; it may reach over the border. The object is scaled to width
    and height; without them it stays as it is."""

    left: Place
    top: Place
    width: Side | None = None
    height: Side | None = None


class ComposeRequest(PictureRequest):
    """Body of POST /v1/images/compose. background, object: data URLs, the object with its opacity. prompt: of the
    composed picture; object_words: those of it that name the object; background_prompt: of the background alone. The
    rest are options of `attnzoo.vision.compose.ComposeOptions`."""

    background: str
    object: str
    region: Region
    object_words: Annotated[Label, Field(min_length=1)]
    background_prompt: Label
    guidance_scale: Scale | None = None
    infused: Share | None = None
    pasted: Share | None = None
    kept: Share | None = None
    confined: bool | None = None

    def check(self) -> None:
        super().check()
        if (self.region.width is None) != (self.region.height is None):
            raise ApiError(400, "region has one of width and height; give both, or none", param="region")

    def options(self) -> ComposeOptions:
        """Those that are given, and the library's own for the others."""
        names = {"steps": self.steps, "guidance": self.guidance_scale, "confined": self.confined}
        names |= {name: getattr(self, name) for name in ("infused", "pasted", "kept")}
        return ComposeOptions(**{name: value for name, value in names.items() if value is not None})  # type: ignore[arg-type]


Kind = TypeVar("Kind", bound=PictureRequest)


def parse_image(body: bytes) -> ImageRequest:
    """Parses a body. Raises ApiError 400 that names the first field that is wrong, unknown or not supported."""
    return _parse(ImageRequest, body, NEUTRAL)


def parse_compose(body: bytes) -> ComposeRequest:
    """The same for a composition."""
    return _parse(ComposeRequest, body, NEUTRAL_OF_COMPOSE)


def _parse(kind: type[Kind], body: bytes, neutral: Mapping[str, Values]) -> Kind:
    values = read_object(body, " and ".join(name for name, field in kind.model_fields.items() if field.is_required()))
    if "seed" in neutral and values.get("seed") is not None:
        raise ApiError(400, "seed has no effect: a composition draws nothing at random; leave it out", param="seed")
    take_neutral(values, neutral)

    def fields(where: Where) -> list[str]:
        return list(Region.model_fields if "region" in where[:-1] else kind.model_fields)

    request: Any = validated(kind, values, fields)
    request.check()
    return request
