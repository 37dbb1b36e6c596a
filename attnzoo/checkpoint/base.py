"""A model on disk in any format: its configuration, and its tensors under the format's own names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.models import DecoderConfig

Shape = tuple[int, ...]
Piece = tuple[str, int, Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load_model` needs to know before it reads weights.

    shapes: of all tensors that the files hold, by their names there. read: yields them in pieces (name, first row,
    rows), each valid until the next is asked for. dtypes: the stored dtypes; of quantised tensors, the dtype they are
    read in. name: maps our name of a tensor to its name in the files. ignored: whether a tensor of the files is not
    loaded. metadata: what was saved beside the model.
    """

    path: Path
    config: DecoderConfig
    shapes: Mapping[str, Shape]
    read: Callable[[], Iterator[Piece]]
    dtypes: Mapping[str, torch.dtype]
    name: Callable[[str], str] = str
    ignored: Callable[[str], bool] = lambda name: False
    metadata: dict[str, Any] = field(default_factory=dict)


def main_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> torch.dtype:
    """The floating point dtype of most elements of these tensors; float32 where there are none."""
    elements: dict[torch.dtype, int] = {}
    for name in names:
        dtype = checkpoint.dtypes[name]
        if dtype.is_floating_point:
            elements[dtype] = elements.get(dtype, 0) + torch.Size(checkpoint.shapes[name]).numel()
    return max(elements, key=lambda dtype: elements[dtype], default=torch.float32)


def check_shapes(path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raises ValueError that names the first tensors that are missing, unexpected or of another shape."""
    missing = [f"{name} {list(expected[name])}" for name in sorted(expected.keys() - found.keys())]
    unexpected = [f"{name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    wrong = [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    problems = [
        f"{kind}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{path}: the tensors do not fit the configuration; {'; '.join(problems)}. Is it complete, and are "
            "configuration and weights of one model?"
        )
