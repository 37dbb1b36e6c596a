"""Data sets in their original formats: one format, one file, with a function `load(path, ...)` that makes a cohort."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.formats import eicu, fhir, mimic, mts_dialog, physionet2012, pmdata, yaib
from attnzoo.errors import suggest
from attnzoo.registry import Registry

FORMATS: Registry[Callable[..., Cohort]] = Registry("data format")
for _module in (physionet2012, yaib, eicu, pmdata, mimic, fhir, mts_dialog):
    FORMATS.register(_module.__name__.rpartition(".")[2])(_module.load)

ROWS = {"mts_dialog": "dialogue", "pmdata": "day"}
"""What a row of a cohort is, by the format's name; of the others a stay."""


def row_name(format: str) -> str:
    """What a row of a cohort of this format is, in words."""
    return ROWS.get(format, "stay")


def load_cohort(format: str, path: str | Path, **options: Any) -> Cohort:
    """The cohort at `path`. options: those of the format's `load`, for example hours and variables.

    Raises ValueError for an unknown format or option.
    """
    check_options(format, options)
    return FORMATS.get(format)(path, **options)


def check_options(format: str, names: Iterable[str]) -> None:
    """Raises ValueError for an unknown format, and for names that are no options of its `load`."""
    given = inspect.signature(FORMATS.get(format)).parameters.items()
    known = [name for name, parameter in given if parameter.kind is parameter.KEYWORD_ONLY]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of the data format {format!r}{suggest(name, known)}")
