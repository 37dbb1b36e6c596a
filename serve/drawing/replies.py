"""Pydantic models of the replies of /v1/images/*: the source of their OpenAPI schemas."""

from typing import Any, Literal

from serve.openai.answers import Reply


class ImageData(Reply):
    """A PNG file in base64. seed: with which the same request draws it again; a composition has none."""

    b64_json: str
    seed: int | None = None


class ImageList(Reply):
    """Body of a reply, and the last event of a stream. seconds: of the work, without waiting; forwards: calls of the
    model."""

    object: Literal["image.list"]
    created: int
    model: str
    size: str
    output_format: Literal["png"]
    seconds: float
    forwards: int
    data: list[ImageData]


class ImageStep(Reply):
    """An event of a stream: image number `image` has done a step. part: a composition inverts background and object
    first. b64_json: what the model sees in the noise, where a preview is wanted."""

    object: Literal["image.step"]
    image: int
    step: int
    of: int
    part: Literal["inversion", "generation"]
    b64_json: str | None


class DiffusionCard(Reply):
    """A diffusion model in the list of models. size: of its pictures; words: those that it knows; max_words: of a
    prompt; composes: whether /v1/images/compose takes it; max_drawn, max_steps, max_pixels: the server's limits."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["diffusion"]
    version: str
    weights_digest: str
    size: str
    composes: bool
    max_words: int
    words: list[str]
    max_drawn: int
    max_steps: int
    max_pixels: int


REPLIES: tuple[Any, ...] = (ImageList, ImageStep, DiffusionCard)
