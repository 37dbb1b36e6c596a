"""The diffusion model of a server, and the thread that draws."""

import base64
import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from attnzoo.checkpoint import model_files
from attnzoo.vision.compose import Tell, check_model
from attnzoo.vision.pillow import import_pillow
from attnzoo.vision.trained_diffusion import TrainedDiffusion, load_diffusion, to_pixels
from serve.config import ServeConfig
from serve.images import ImageLimits
from serve.openai.answer import no_model
from serve.workplace import Deadline, Terms, Workplace


@dataclass(frozen=True, kw_only=True)
class Artist:
    """A diffusion model that is served. name: in the API; version, weights_digest: of its files; cannot_compose: why it
    does not compose, None where it does."""

    name: str
    trained: TrainedDiffusion
    version: str
    weights_digest: str
    cannot_compose: str | None

    @classmethod
    def load(cls, directory: Path, name: str) -> "Artist":
        """The model of an export. Raises ValueError as `load_diffusion`, for pictures that are not of three colours,
        and without the package that reads and writes pictures."""
        import_pillow()
        path = model_files.find(directory)
        trained = load_diffusion(path)
        if trained.model.config.channels != 3:
            raise ValueError(
                f"{path}: model.channels={trained.model.config.channels} cannot be sent as pictures; train with 3"
            )
        try:
            check_model(trained)
            why = None
        except ValueError as error:
            why = str(error)
        version, weights = model_files.digests(path)
        return cls(name=name, trained=trained, version=version, weights_digest=weights, cannot_compose=why)

    @property
    def size(self) -> str:
        """Of its pictures, as OpenAI writes it."""
        side = self.trained.model.config.image_size
        return f"{side}x{side}"


@dataclass(frozen=True)
class Draft:
    """A picture to be made. paint: makes it, [1, 3, H, W], and calls what it is given after each of `steps` steps, of
    which the first `inverting` invert what is composed. seed: None where nothing is drawn at random."""

    steps: int
    paint: Callable[[Tell], Tensor]
    seed: int | None = None
    inverting: int = 0


@dataclass(frozen=True)
class Painted:
    """What has become of drafts. pictures: PNG in base64; forwards: calls of the model."""

    pictures: list[str]
    seconds: float
    forwards: int


class LeftError(Exception):
    """The client has gone."""


class Studio(Workplace):
    """The diffusion model of a server, at work. Call the methods from one event loop, but for `paint`."""

    def __init__(self, artist: Artist, config: ServeConfig) -> None:
        super().__init__(
            Terms(
                what="drawing",
                most=("max_drawings", config.max_drawings),
                timeout_s=("draw_timeout_s", config.draw_timeout_s),
                fewer="ask for fewer steps or pictures at a time",
            )
        )
        self.artist, self.config = artist, config
        self.limits = ImageLimits(config.max_body_bytes, max_pixels=config.max_draw_pixels)

    def check_name(self, name: str) -> None:
        """Raises ApiError 404 for another model."""
        if name != self.artist.name:
            raise no_model(name, self.artist.name)

    def paint(
        self,
        drafts: Sequence[Draft],
        every: int | None,
        deadline: Deadline,
        left: threading.Event,
        tell: Callable[[dict[str, Any]], None],
    ) -> Painted:
        """Makes the pictures, each by itself, so that no other picture changes a bit of it. every: steps between
        previews; None: no previews. tell: gets the event of each step, in this thread. Raises LeftError soon after
        `left` is set, and LateError."""
        started, forwards = time.perf_counter(), 0

        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        found = []
        counting = self.artist.trained.model.register_forward_pre_hook(count)
        try:
            for number, draft in enumerate(drafts):
                step = 0

                def stepped(x0: Tensor, number: int = number, draft: Draft = draft) -> None:
                    nonlocal step
                    if left.is_set():
                        raise LeftError
                    deadline.check()
                    step += 1
                    seen = every is not None and step % every == 0
                    tell(_event(number, step, draft, encoded(x0.clamp(-1, 1)) if seen else None))

                found.append(encoded(draft.paint(stepped)))
        finally:
            counting.remove()
        return Painted(found, time.perf_counter() - started, forwards)


def _event(number: int, step: int, draft: Draft, preview: str | None) -> dict[str, Any]:
    return {
        "object": "image.step",
        "image": number,
        "step": step,
        "of": draft.steps,
        "part": "inversion" if step <= draft.inverting else "generation",
        "b64_json": preview,
    }


def encoded(x_1CHW: Tensor) -> str:
    """A picture between -1 and 1 as PNG in base64. Raises FloatingPointError for one that is not finite."""
    if not bool(x_1CHW.isfinite().all()):
        raise FloatingPointError("the picture is not finite")
    out = io.BytesIO()
    import_pillow().Image.fromarray(to_pixels(x_1CHW)[0]).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
