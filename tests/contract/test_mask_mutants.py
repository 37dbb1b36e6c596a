"""Masks that are read wrongly must not pass the check of every operation against its reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnzoo.ops.common import masks, row_blocks
from tests.helpers.masked_ops import check_implementations

Patch = pytest.MonkeyPatch


def sees_wrongly(**changed: Callable[[Tensor | None], Tensor | None]) -> Callable[[Patch], None]:
    """Some fields of the mask are taken for others, wherever it is read pair by pair."""

    def mutate(patch: Patch) -> None:
        right = masks.sees

        def wrong(queries, keys, **fields):
            return right(queries, keys, **(fields | {name: change(fields[name]) for name, change in changed.items()}))

        patch.setattr(masks, "sees", wrong)

    return mutate


def key_padding_ignored(patch: Patch) -> None:
    """Keys that do not exist are seen."""
    sees_wrongly(exists=lambda exists: None)(patch)


def prefix_off_by_one(patch: Patch) -> None:
    """The first token after the prefix sees it from within."""
    sees_wrongly(prefix=lambda prefix: None if prefix is None else prefix + 1)(patch)


def empty_row_in_the_softmax(patch: Patch) -> None:
    """Queries that see nothing are not told apart: their softmax is NaN."""
    patch.setattr(masks, "_opened", lambda *fields: (masks._visible(*fields), None))
    right = row_blocks._hide

    def wrong(*block):
        right(*block)

    patch.setattr(row_blocks, "_hide", wrong)


def empty_row_is_a_mean(patch: Patch) -> None:
    """Queries that see nothing are opened to all keys, and nobody puts zeros in their place."""
    right = masks._opened
    patch.setattr(masks, "_opened", lambda *fields: (right(*fields)[0], None))


def future_row_off_by_one(patch: Patch) -> None:
    """Keys after the query read the row of the next distance."""
    right = row_blocks._table_rows

    def wrong(reach, future_rows, rows, device):
        row = right(reach, future_rows, rows, device)
        return torch.where(row < future_rows, (row - 1).clamp(min=0), row)

    patch.setattr(row_blocks, "_table_rows", wrong)


MASK_MUTANTS = [
    (key_padding_ignored, "sdpa", "keys that exist"),
    (key_padding_ignored, "sinusoid_sdpa", "padded prefix"),
    (key_padding_ignored, "biased_sdpa", "regions"),
    (prefix_off_by_one, "sdpa", "prefix"),
    (prefix_off_by_one, "relative_sdpa", "prefix and window"),
    (prefix_off_by_one, "biased_sdpa", "streamed prefix"),
    (empty_row_in_the_softmax, "sdpa", "a step without keys"),
    (empty_row_in_the_softmax, "relative_sdpa", "padding"),
    (empty_row_is_a_mean, "sdpa", "regions"),
    (empty_row_is_a_mean, "biased_sdpa", "streamed full"),
    (future_row_off_by_one, "relative_sdpa", "full"),
    (future_row_off_by_one, "biased_sdpa", "prefix"),
]


@pytest.mark.parametrize(
    ("mutate", "name", "case"), MASK_MUTANTS, ids=[f"{m[0].__name__}-{m[1]}-{m[2]}" for m in MASK_MUTANTS]
)
def test_a_mask_read_wrongly_dies(mutate, name, case, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_implementations(name, case)
