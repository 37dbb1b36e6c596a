"""From requests to pictures that can be made: what the model cannot read, or the server does not allow, is refused."""

import secrets
from difflib import get_close_matches

import numpy as np
from torch import Tensor

from attnzoo.vision.captions import words_of
from attnzoo.vision.compose import Placement, Tell, compose
from attnzoo.vision.pillow import import_pillow
from serve.drawing.protocol import GUIDANCE, MAX_SIDE, STEPS, ComposeRequest, ImageRequest, PictureRequest, Region
from serve.drawing.studio import Artist, Draft, Studio
from serve.images import decoded, decoded_with_opacity
from serve.openai.errors import ApiError, short_name
from serve.openai.json_body import MOST

MOST_SEED = 1 << 31
"""Seeds that the server chooses are below it, so that every client can hold them."""


def drafts_of(request: ImageRequest, studio: Studio) -> list[Draft]:
    """The pictures of a prompt. Raises ApiError 400."""
    steps, config = _steps(request, studio, STEPS), studio.config
    number = request.n or 1
    if number > config.max_drawn:
        what = f"n={number} is more than the {config.max_drawn} pictures that a request may have (max_drawn)"
        raise ApiError(400, f"{what}; send several requests", param="n")
    check_words(studio.artist, request.prompt, "prompt")
    first = secrets.randbelow(MOST_SEED) if request.seed is None else request.seed
    guidance = GUIDANCE if request.guidance_scale is None else request.guidance_scale
    trained = studio.artist.trained

    def draft(seed: int) -> Draft:
        def paint(tell: Tell) -> Tensor:
            return trained.draw([request.prompt], [seed], steps=steps, guidance=guidance, tell=tell)

        return Draft(steps, paint, seed)

    return [draft((first + at) % (MOST + 1)) for at in range(number)]


def composition_of(request: ComposeRequest, studio: Studio) -> list[Draft]:
    """The composed picture. Raises ApiError 400."""
    artist, options = studio.artist, request.options()
    if artist.cannot_compose is not None:
        raise ApiError(400, f"{artist.name!r} does not compose: {artist.cannot_compose}", param="model")
    _steps(request, studio, options.steps)
    placement = placed(request, studio)

    def paint(tell: Tell) -> Tensor:
        return compose(artist.trained, [placement], options, tell=tell)

    return [Draft(3 * options.steps, paint, inverting=2 * options.steps)]


def placed(request: ComposeRequest, studio: Studio) -> Placement:
    """What is to be composed. Raises ApiError 400."""
    artist = studio.artist
    for where in ("prompt", "background_prompt"):
        check_words(artist, getattr(request, where), where)
    try:
        words_of(request.prompt, request.object_words)
    except ValueError as error:
        raise ApiError(400, f"object_words: {error}", param="object_words") from None
    background = decoded(request.background, "background", studio.limits)
    side = artist.trained.model.config.image_size
    if background.shape[1:] != (side, side):
        height, width = background.shape[1:]
        what = f"background has {width} x {height} pixels, and this model's pictures have {side} x {side}; scale it"
        raise ApiError(400, what, param="background")
    thing = decoded_with_opacity(request.object, "object", studio.limits).permute(1, 2, 0).numpy()
    placement = Placement(
        background=np.ascontiguousarray(background.permute(1, 2, 0).numpy()),
        thing=_scaled(np.ascontiguousarray(thing), request.region),
        left=request.region.left,
        top=request.region.top,
        background_caption=request.background_prompt,
        caption=request.prompt,
        words=request.object_words,
    )
    if not placement.region().any():
        what = (
            f"region: the object at left={placement.left}, top={placement.top} is not in the picture of {side} pixels, "
            "or transparent; place it inside"
        )
        raise ApiError(400, what, param="region")
    return placement


def _scaled(thing_HWC: np.ndarray, region: Region) -> np.ndarray:
    """The object in the size of its region. Raises ApiError 400 for one that has none and is too large."""
    size = thing_HWC.shape[1], thing_HWC.shape[0]
    if region.width is None or region.height is None:
        if max(size) > MAX_SIDE:
            what = f"object has {size[0]} x {size[1]} pixels; give region.width and region.height, at most {MAX_SIDE}"
            raise ApiError(400, what, param="region")
        return thing_HWC
    if size == (region.width, region.height):
        return thing_HWC
    pillow = import_pillow()
    # Colours are weighed by their opacity, so that those behind transparent pixels do not shine through.
    image = pillow.Image.fromarray(thing_HWC).resize((region.width, region.height), pillow.Image.Resampling.BILINEAR)
    return np.array(image, np.uint8)


def _steps(request: PictureRequest, studio: Studio, default: int) -> int:
    """The steps of a request whose limits hold. Raises ApiError 400."""
    steps, most = request.steps or default, studio.config.max_draw_steps
    if steps > most:
        raise ApiError(400, f"steps={steps} is more than the {most} that are allowed (max_draw_steps)", param="steps")
    if request.size not in (None, "auto", studio.artist.size):
        what = f"size={short_name(request.size)!r} is not that of this model, which draws {studio.artist.size}"
        raise ApiError(400, f"{what}; leave it out", param="size")
    return steps


def check_words(artist: Artist, text: str, where: str) -> None:
    """Raises ApiError 400 for a caption that the model cannot read."""
    words, known, most = text.split(), artist.trained.words.words, artist.trained.model.config.words
    for word in words:
        if word not in known:
            shown = short_name(word)
            near = get_close_matches(shown.lower(), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            what = f"{where} has the word {shown!r}, which this model has not learned{hint}"
            raise ApiError(400, f"{what} /v1/models/{artist.name} lists its words", param=where)
    if len(words) > most:
        raise ApiError(400, f"{where} has {len(words)} words, and this model reads {most}; shorten it", param=where)
