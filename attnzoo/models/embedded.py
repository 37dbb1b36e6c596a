"""Prompts that are token ids at most positions and embeddings at the others: an image, or the numbers of sensors.

Letters: M embeddings of a part, D model_dim.
"""

import hashlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from attnzoo.models.decoder_lm import DecoderLM
from attnzoo.types import PLACE


@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings rows_MD in a prompt, from position `start` on. name: what edits and reads of attention call them."""

    rows_MD: Tensor
    start: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        rows_MD = self.rows_MD
        if not isinstance(rows_MD, Tensor) or rows_MD.dim() != 2 or not rows_MD.is_floating_point():
            what = f"{rows_MD.dtype} {tuple(rows_MD.shape)}" if isinstance(rows_MD, Tensor) else type(rows_MD).__name__
            raise ValueError(f"embeddings are {what}; give a tensor [rows, model_dim] of floating-point numbers")
        if 0 in rows_MD.shape:
            raise ValueError(f"embeddings of shape {tuple(rows_MD.shape)} are empty; give at least one row")
        if not bool(rows_MD.isfinite().all()):
            raise ValueError("embeddings hold NaN or infinity; give finite numbers")

    @property
    def stop(self) -> int:
        """The position behind the last embedding."""
        return self.start + len(self.rows_MD)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape, dtype and numbers: what stands for the embeddings where prompts are compared."""
        rows_MD = self.rows_MD.detach().cpu().contiguous()
        found = hashlib.sha256(f"{tuple(rows_MD.shape)} {rows_MD.dtype}".encode())
        found.update(rows_MD.view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


class EmbeddedPrompt(Sequence[int]):
    """A prompt of token ids and embeddings, which goes wherever the ids of a prompt go.

    As a sequence it holds the ids, and `PLACE` for each embedding; a slice of it is a prompt with what stands there.
    parts: token ids, and `Embedded`, whose `start` is set to where they stand. Raises ValueError for an id that is none
    and for embeddings of several widths.
    """

    def __init__(self, parts: Sequence[Sequence[int] | Embedded]) -> None:
        ids: list[int] = []
        embedded: list[Embedded] = []
        for part in parts:
            if isinstance(part, Embedded):
                embedded.append(replace(part, start=len(ids)))
                ids += [PLACE] * len(part.rows_MD)
            else:
                ids += map(_token, part)
        if len({part.rows_MD.shape[1] for part in embedded}) > 1:
            widths = sorted({part.rows_MD.shape[1] for part in embedded})
            raise ValueError(f"embeddings of widths {widths} in one prompt; a model has one width (model_dim)")
        self.ids, self.embedded = tuple(ids), tuple(embedded)

    @classmethod
    def around(cls, pieces: Sequence[Sequence[int]], embedded: Sequence[Embedded]) -> "EmbeddedPrompt":
        """Token ids in pieces, and one `Embedded` between each two of them."""
        first, *others = pieces
        return cls([first, *(part for pair in zip(embedded, others, strict=True) for part in pair)])

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> "EmbeddedPrompt": ...
    def __getitem__(self, at: int | slice) -> "int | EmbeddedPrompt":
        if not isinstance(at, slice):
            return self.ids[at]
        first, stop, step = at.indices(len(self.ids))
        if step != 1:
            raise ValueError(f"a prompt with embeddings has no slices of step {step}")
        found = EmbeddedPrompt([])
        found.ids = self.ids[first:stop]
        found.embedded = tuple(
            replace(
                part,
                rows_MD=part.rows_MD[max(first - part.start, 0) : stop - part.start],
                start=max(part.start - first, 0),
            )
            for part in self.embedded
            if part.start < stop and part.stop > first
        )
        return found

    @property
    def tokens(self) -> list[int]:
        """The token ids alone."""
        return [token for token in self.ids if token != PLACE]

    @property
    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """Where the embeddings with a name stand, [start, stop)."""
        found: dict[str, list[tuple[int, int]]] = {}
        for part in self.embedded:
            if part.name is not None:
                found.setdefault(part.name, []).append((part.start, part.stop))
        return found

    def check_width(self, width: int) -> None:
        """Raises ValueError unless the embeddings have the width of a model."""
        for part in self.embedded:
            if part.rows_MD.shape[1] != width:
                raise ValueError(
                    f"embeddings of shape {tuple(part.rows_MD.shape)} in the prompt; this model's have {width} numbers "
                    "a row (model_dim)"
                )


def _token(token: Any) -> int:
    try:
        found = operator.index(token)
    except TypeError:
        raise ValueError(f"prompt token {token!r} is not an integer; encode the text first") from None
    if isinstance(token, bool) or found < 0:
        raise ValueError(
            f"prompt token {token!r} is no token id; give integers from 0, and embeddings as Embedded(...)"
        )
    return found


def token_ids(prompt: Sequence[int]) -> Sequence[int]:
    """The token ids of any prompt, without places of embeddings."""
    return prompt.tokens if isinstance(prompt, EmbeddedPrompt) else prompt


def prompt_tensor(model: DecoderLM, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Prompts, or slices of them, as the model reads them together: tokens_BT, or embeddings [B, T, model_dim] where
    one of them has embeddings. Padding stands behind the shorter ones."""
    longest = max(map(len, prompts))
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    tokens_BT = torch.tensor(padded, dtype=torch.long, device=model.embedding.weight.device)
    given = [(row, prompt.embedded) for row, prompt in enumerate(prompts) if isinstance(prompt, EmbeddedPrompt)]
    if not any(embedded for _, embedded in given):
        return tokens_BT
    x_BTD = model.embed(tokens_BT.clamp_min(0))
    for row, embedded in given:
        for part in embedded:
            x_BTD[row, part.start : part.stop] = part.rows_MD.to(x_BTD)
    return x_BTD
