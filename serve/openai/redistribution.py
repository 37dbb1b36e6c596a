"""The field `redistribution` of chats: attention of sinks is given to the picture of the conversation, and the answer
says what that was (`attnzoo.vision.redistribution`).

It is a list of declared edits, so the request runs by itself beside the batch, with a state of its own. Reads are of
weights after all edits; from them it is known what was before: where a head and a query pass the filter afterwards they
have passed it before, because what they gave made the picture's part only larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from attnzoo.attention.edits import After, EditRun, Item, Mass, Move, Sinks, Where
from attnzoo.models import EmbeddedPrompt
from attnzoo.vision.redistribution import redistribution
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.openai.encoding import in_data_thread
from serve.openai.errors import ApiError, unsupported
from serve.openai.invalid import explain_invalid
from serve.openai.protocol import Strict

FIELD, IMAGE = "redistribution", "image_url[0]"
NEAR = 1 - 256 * torch.finfo(torch.float32).eps
"""As in `Move.parts`."""
Share = Annotated[float, Field(ge=0, le=1)]


class Redistribution(Strict):
    """p: the share of the sinks' weight that the picture gets. least: a head is changed where the picture has at least
    so much of its weight; rho: and of that the picture's tokens without sinks at least this part."""

    p: Annotated[float, Field(gt=0, le=0.99)] = 0.6
    rho: Share = 0.8
    least: Share = 0.2


def read_redistribution(given: Any) -> Redistribution | None:
    """What the field says, None where it is off. Raises ApiError that names the field."""
    if given is None or given is False:
        return None
    try:
        return Redistribution.model_validate({} if given is True else given)
    except ValidationError as error:
        raise explain_invalid(error, FIELD, lambda _: list(Redistribution.model_fields)) from None


@dataclass(frozen=True)
class Redistributed:
    """The edits of a request, one a layer, and the reads that tell what they did, in the order of the edits."""

    options: Redistribution
    edits: tuple[Move, ...]
    reads: tuple[Mass, ...]

    def reply(self, run: EditRun) -> dict[str, Any]:
        """The object `redistribution` of a choice that has ended."""
        return {**self.options.model_dump(), "layers": [self._layer(run, edit) for edit in self.edits]}

    def _layer(self, run: EditRun, edit: Move) -> dict[str, Any]:
        layers, sinks, options = edit.where.layers, edit.where.keys, self.options
        assert isinstance(layers, tuple)
        assert isinstance(sinks, Sinks)
        (layer,) = layers
        result = run.reading[layer].results[0]
        if not result.values:
            return {"layer": layer, "queries": 0, "sinks": [], "heads": [], "moved": [], "picture": [], "sink": []}
        picture_NQ, sinks_NQ, either_NQ = (result.values[name].double() for name in ("picture", "sinks", "either"))
        receiving_NQ = either_NQ - sinks_NQ
        changed_NQ = (picture_NQ >= options.least * NEAR) & (receiving_NQ >= options.rho * NEAR * picture_NQ)
        changed_NQ &= sinks_NQ > 0
        moved_NQ = torch.where(changed_NQ, sinks_NQ * (options.p / (1 - options.p)), 0.0)
        inside_NQ = (picture_NQ + sinks_NQ - either_NQ).clamp(min=0)  # sinks of the picture gave, too
        given_NQ = torch.where(changed_NQ, inside_NQ * (options.p / (1 - options.p)), 0.0)
        heads = changed_NQ.any(1).nonzero()[:, 0].tolist()
        return {
            "layer": layer,
            "queries": picture_NQ.shape[1],
            "sinks": run.positions(layer, sinks),
            "heads": [result.heads[head] for head in heads],
            "moved": [_short(moved_NQ[head].mean()) for head in heads],
            "picture": [_short((picture_NQ - moved_NQ + given_NQ).mean()), _short(picture_NQ.mean())],
            "sink": [_short((sinks_NQ + moved_NQ).mean()), _short(sinks_NQ.mean())],
        }


def _short(x: Tensor) -> float:
    """Six digits."""
    return float(f"{float(x):.6g}")


async def redistributed(
    options: Redistribution | None, prompt: Sequence[int], engine: AsyncEngine, config: ServeConfig
) -> Redistributed | None:
    """The edits of a conversation. Raises ApiError where there is nothing to redistribute, or it is not allowed."""
    if options is None:
        return None
    if engine.engine.pictures is None:
        raise unsupported(FIELD, "gives attention to pictures, and this server's model reads none; leave it out")
    if config.attention != "edit":
        what = f"edits attention, which this server does not allow (its setting attention={config.attention})"
        raise unsupported(FIELD, f"{what}; leave it out")
    pictures = len(prompt.embedded) if isinstance(prompt, EmbeddedPrompt) else 0
    if pictures != 1:
        what = f"{FIELD} gives attention to one picture, and the conversation has {pictures or 'none'}"
        raise ApiError(400, f"{what}; send one, or leave {FIELD} out", param=FIELD)
    try:
        sinks = await in_data_thread(engine.engine.sinks)
        items = redistribution(sinks, p=options.p, rho=options.rho, least=options.least, image=IMAGE)
    except ValueError as error:
        raise ApiError(400, f"{FIELD}: {error}; leave it out", param=FIELD, code="no_sinks") from None
    edits = tuple(item for item in items if isinstance(item, Move))
    return Redistributed(options, edits, tuple(map(_read_of, edits)))


def _read_of(edit: Move) -> Mass:
    """What tells of an edit what it did."""
    sinks, picture = edit.where.keys, edit.to
    bins = {"picture": picture, "sinks": sinks, "either": (picture, sinks)}
    return Mass(Where(layers=edit.where.layers, queries=After(IMAGE)), bins=bins)


def items_of(given: Redistributed | None) -> tuple[list[Item], list[Item]]:
    """(edits, reads)."""
    return ([], []) if given is None else ([*given.edits], [*given.reads])
