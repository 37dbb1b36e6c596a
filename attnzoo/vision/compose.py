"""Composition of an object into a background by steering attention, without training.

Source: PrimeComposer (Wang et al. 2024, arXiv 2403.05053). Background and object are inverted to noise; generation
begins with the background's noise and the object's where it is. In the first steps scores are infused
(`attnzoo.models.Infusion`), words of the object act in its region alone, and guidance also goes from the picture
without infusion to that with it,

    x0 = a + s (b' - a') + s (b' - b),   a, b without and with the caption, a', b' the same with infusion,

and everything outside the box is set back to the inverted background.

Differs from the paper: the object is inverted as it is pasted on the background, not alone; times are even in the log
signal-to-noise ratio; regions are pooled to the levels of the model by `places`, and cut by the border; the words are
all those of the object's phrase.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnzoo.attention.edits import EditPlan, EditRun, Edits, Except, Hide, Span, TokenLayout, Where, layer_sizes
from attnzoo.diffusion import grid, solve, told
from attnzoo.diffusion.schedule import IMAGE, NOISE
from attnzoo.models import DiffusionUNet, Infusion
from attnzoo.models.diffusion_infusion import places, spans_of
from attnzoo.types import CheckedConfig
from attnzoo.vision.captions import words_of
from attnzoo.vision.trained_diffusion import TrainedDiffusion, from_pixels

Tell = Callable[[Tensor], None]
"""Gets what the model sees in the latents, [N, C, H, W], at each step, and may raise to end the work."""


@dataclass(frozen=True)
class Placement:
    """What is to be composed. background: uint8 [H, W, 3]; thing: uint8 [h, w, 4], the object with its opacity, in the
    size that it shall have; left, top: where its corner comes, which may be outside the picture.
    background_caption, caption: of the background and of the composed picture; words: those of `caption` that name the
    object."""

    background: np.ndarray
    thing: np.ndarray
    left: int
    top: int
    background_caption: str
    caption: str
    words: str

    def pasted(self) -> np.ndarray:
        """The object on the background, uint8 [H, W, 3]: cut and paste."""
        (rows, columns), own = self.box(), self._own()
        image = self.background.copy()
        opacity = own[..., 3:].astype(np.int32)
        under = image[rows, columns].astype(np.int32)
        image[rows, columns] = (own[..., :3].astype(np.int32) * opacity + under * (255 - opacity) + 127) // 255
        return image

    def region(self) -> np.ndarray:
        """bool [H, W]: where the object hides at least half of the background."""
        found = np.zeros(self.background.shape[:2], bool)
        found[self.box()] = self._own()[..., 3] >= 128
        return found

    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the part of its square that is in the picture."""
        height, width = self.background.shape[:2]
        tall, wide = self.thing.shape[:2]
        return (
            slice(min(max(self.top, 0), height), max(min(self.top + tall, height), 0)),
            slice(min(max(self.left, 0), width), max(min(self.left + wide, width), 0)),
        )

    def _own(self) -> np.ndarray:
        """The part of the object that is in the picture."""
        rows, columns = self.box()
        return self.thing[
            rows.start - self.top : rows.stop - self.top, columns.start - self.left : columns.stop - self.left
        ]


@dataclass(frozen=True, kw_only=True)
class ComposeOptions(CheckedConfig):
    """steps: of inversion and of generation. guidance: s above. infused, pasted, kept: shares of the steps in which
    scores are infused, the object's latent is pasted, and the background outside the box is set back (the paper's
    tau_a, tau_c and tau_b). confined: whether the object's words act in its region alone."""

    steps: int = 20
    guidance: float = 2.5
    infused: float = 0.3
    pasted: float = 0.2
    kept: float = 0.8
    confined: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance={self.guidance} must be from 0 to 100")
        for name in ("infused", "pasted", "kept"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")

    def lasts(self, share: float, step: int) -> bool:
        """Whether a step, from 0 on, is among the first ones of that share."""
        return step < round(share * self.steps)


@torch.no_grad()
def invert(
    trained: TrainedDiffusion, images_NCHW: Tensor, captions: Sequence[str], steps: int, tell: Tell | None = None
) -> list[Tensor]:
    """Latents of pictures from noise to image, steps + 1 of them, each [N, C, H, W]: what generation without guidance
    walks through (Song et al. 2020, arXiv 2010.02502, section 4.3)."""
    words_NL = trained.encode(captions)
    found = [images_NCHW]

    def denoise(x: Tensor, half_log_snr: float) -> Tensor:
        out: Tensor = trained.model(x, x.new_full((len(x),), half_log_snr), words_NL)
        return out

    def watch(step: int, x: Tensor) -> Tensor:
        found.append(x)
        return x

    solve(images_NCHW, told(denoise, tell), grid(steps, start=IMAGE, end=NOISE), watch=watch)
    return found[::-1]


@dataclass(frozen=True)
class Inverted:
    """Latents of cases from noise to image, steps + 1 of each kind, [N, C, H, W]: of backgrounds, and of objects as
    they are pasted on them. They depend on no option but the number of steps."""

    background: list[Tensor]
    thing: list[Tensor]


def invert_cases(
    trained: TrainedDiffusion, cases: Sequence[Placement], steps: int, tell: Tell | None = None
) -> Inverted:
    """What `compose` begins with; `tell` is called twice for each step. Raises ValueError as `compose` does."""
    _check(trained, cases)
    backgrounds = from_pixels(np.stack([case.background for case in cases]))
    pasted = from_pixels(np.stack([case.pasted() for case in cases]))
    return Inverted(
        invert(trained, backgrounds, [case.background_caption for case in cases], steps, tell),
        invert(trained, pasted, [case.caption for case in cases], steps, tell),
    )


@torch.no_grad()
def compose(
    trained: TrainedDiffusion,
    cases: Sequence[Placement],
    options: ComposeOptions,
    inverted: Inverted | None = None,
    *,
    tell: Tell | None = None,
) -> Tensor:
    """The composed pictures, between -1 and 1, [N, C, H, W]; nothing is drawn at random. inverted: what `invert_cases`
    has found of these cases, so that compositions with several options share it; without it, `tell` hears of its steps
    too.

    Raises ValueError for pictures of another size than the model's, captions with words that it does not know, words of
    an object that its caption has not, objects outside of the picture, and an inversion of other steps or cases.
    """
    walk = _Walk(trained, cases, options, inverted, tell)
    return solve(walk.first(), told(walk.denoise, tell), grid(options.steps), watch=walk.after).clamp(-1, 1)


class _Walk:
    """One batch on its way from noise to pictures."""

    def __init__(
        self,
        trained: TrainedDiffusion,
        cases: Sequence[Placement],
        options: ComposeOptions,
        inverted: Inverted | None = None,
        tell: Tell | None = None,
    ) -> None:
        _check(trained, cases)
        self.model, self.options, self.step = trained.model, options, 0
        regions = np.stack([case.region() for case in cases])
        boxes = np.zeros_like(regions)
        for row, case in enumerate(cases):
            boxes[(row, *case.box())] = True
        self.region_NHW, self.box_N1HW = torch.from_numpy(regions), torch.from_numpy(boxes)[:, None]
        self.words_NL = trained.encode([case.caption for case in cases])
        self.empty_NL = torch.full_like(self.words_NL, -1)
        self.spans = [words_of(case.caption, case.words) for case in cases]
        found = invert_cases(trained, cases, options.steps, tell) if inverted is None else inverted
        if (len(found.background), len(found.background[0])) != (options.steps + 1, len(cases)):
            raise ValueError(
                f"inverted has {len(found.background) - 1} steps of {len(found.background[0])} cases; here are "
                f"steps={options.steps} and {len(cases)} cases"
            )
        self.background, self.thing = found.background, found.thing
        self._plans: dict[str, list[EditPlan]] = {}

    def composed(self, step: int) -> Tensor:
        """The background's latent with the object's pasted into it."""
        return torch.where(self.region_NHW[:, None], self.thing[step], self.background[step])

    def first(self) -> Tensor:
        """What generation begins with."""
        return self.composed(0)

    def after(self, step: int, x: Tensor) -> Tensor:
        """x with what is pasted and set back."""
        self.step = step + 1
        if self.options.lasts(self.options.pasted, step):
            x = torch.where(self.region_NHW[:, None], self.thing[step + 1], x)
        if self.options.lasts(self.options.kept, step):
            x = torch.where(self.box_N1HW, x, self.background[step + 1])
        return x

    def denoise(self, x: Tensor, half_log_snr: float) -> Tensor:
        """x0 as the module says; without infusion, that of classifier-free guidance."""
        scale, n = self.options.guidance, len(x)

        def model(x: Tensor, infusion: Infusion | None) -> tuple[Tensor, Tensor]:
            """x0 of the first n rows of each half: without and with the caption."""
            copies = len(x) // n
            words = torch.cat([self.empty_NL, self.words_NL] * (copies // 2))
            edits = self._confined(copies) if self.options.confined else None
            out = self.model(x, x.new_full((len(x),), half_log_snr), words, edits=edits, infusion=infusion)
            return out[:n], out[n : 2 * n]

        without, with_caption = model(x.repeat(2, 1, 1, 1), None)
        if not self.options.lasts(self.options.infused, self.step):
            return without + scale * (with_caption - without)
        rows = torch.cat([x.repeat(2, 1, 1, 1), self.composed(self.step).repeat(2, 1, 1, 1)])
        infused, infused_caption = model(rows, Infusion(self.region_NHW.repeat(2, 1, 1)))
        return without + scale * (infused_caption - infused) + scale * (infused_caption - with_caption)

    def _confined(self, copies: int) -> dict[str, list[EditRun | None]]:
        """Cross attention in which the object's words have no weight outside of its region, for rows of which every
        second n have the caption."""
        self._plans = self._plans or {
            name: self._confinement(name) for name in self.model.attentions() if name.endswith("cross")
        }
        none: list[EditRun | None] = [None] * len(self.spans)
        found: dict[str, list[EditRun | None]] = {name: [] for name in self._plans}
        for name, plans in self._plans.items():
            for copy in range(copies):
                found[name] += none if copy % 2 == 0 else [EditRun(plan) for plan in plans]
        return found

    def _confinement(self, name: str) -> list[EditPlan]:
        """What a layer of cross attention has to do in each case; the same in all steps."""
        side = self.model.side(name)
        sizes = [layer_sizes(self.model.attentions()[name], context=True)]
        layout = TokenLayout(side * side, context=TokenLayout(self.words_NL.shape[1]))
        hides = [
            Hide(Where(queries=Except(spans_of(region_T)), keys=Span(*words)))
            for region_T, words in zip(places(self.region_NHW, side), self.spans, strict=True)
        ]
        return [Edits(hide).plan(sizes, layout, streams=False) for hide in hides]


def check_model(trained: TrainedDiffusion) -> None:
    """Raises ValueError for a model that cannot compose."""
    model: DiffusionUNet = trained.model
    for name, layer in model.attentions().items():
        if name.endswith("self") and not layer.traits.context:
            raise ValueError(
                f"model.attention={model.config.attention!r} attends to no other picture (no context), which infusion "
                "needs; train with mha and position none"
            )


def _check(trained: TrainedDiffusion, cases: Sequence[Placement]) -> None:
    check_model(trained)
    size = trained.model.config.image_size
    if not cases:
        raise ValueError("cases=[] has nothing to compose")
    for number, case in enumerate(cases):
        if case.background.shape != (size, size, 3) or case.background.dtype != np.uint8:
            found = f"{case.background.dtype} {list(case.background.shape)}"
            raise ValueError(f"cases[{number}].background is {found}; it must be uint8 {[size, size, 3]}")
        if case.thing.ndim != 3 or case.thing.shape[2] != 4 or case.thing.dtype != np.uint8:
            found = f"{case.thing.dtype} {list(case.thing.shape)}"
            raise ValueError(f"cases[{number}].thing is {found}; it must be uint8 [h, w, 4]")
        if not case.region().any():
            raise ValueError(
                f"cases[{number}]: the object at left={case.left}, top={case.top} is not in the picture of {size} "
                "pixels, or transparent; place it inside"
            )
