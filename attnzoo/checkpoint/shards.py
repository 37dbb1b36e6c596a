"""Tensors in one or many safetensors files: all shapes first, then the contents piece by piece in little memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from attnzoo.checkpoint.base import Piece, Shape
from attnzoo.files import read_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAPPED_BYTES = 16 << 20
"""Bytes that are read of one mapping at most: while a file is mapped, pages that were read count as memory in use."""


@dataclass(frozen=True)
class Shards:
    """All tensors by name: the file that each is in, its shape and its dtype."""

    files: dict[str, Path]
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, directory: Path, integers: bool = False) -> "Shards":
        """The weights in `directory`: the files that its index lists, or the one file. integers: whether integer
        tensors are accepted, as buffers of our own models; elsewhere they are quantised weights.

        Raises ValueError, naming file and tensor, for a tensor or file that is missing, damaged or of another dtype.
        """
        known = DTYPES | INTEGERS if integers else DTYPES
        index = directory / INDEX
        paths = _indexed(index) if os.path.lexists(index) else {directory / WEIGHTS: None}
        files: dict[str, Path] = {}
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path, promised in paths.items():
            with _open(path) as file:
                names = set(file.keys())
                if promised is not None and promised != names:
                    odd = sorted(promised ^ names)
                    raise ValueError(f"{path}: {INDEX} says otherwise about {', '.join(odd[:4])}; copy all files again")
                for name in names:
                    piece = file.get_slice(name)
                    if piece.get_dtype() not in known:
                        raise ValueError(
                            f"{path}: tensor {name} has dtype {piece.get_dtype()}; only {', '.join(known)} are "
                            "supported: give an unquantised checkpoint"
                        )
                    files[name], shapes[name] = path, tuple(piece.get_shape())
                    dtypes[name] = known[piece.get_dtype()]
        return cls(files, shapes, dtypes)

    def read(self) -> Iterator[Piece]:
        """All tensors in pieces of rows, file by file; every piece is mapped by itself."""
        for name, _ in sorted(self.files.items(), key=lambda item: (item[1], item[0])):
            yield from self._pieces(name)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors exist and have equal dtypes, shapes and values."""
        if not (one in self.shapes and other in self.shapes and self.shapes[one] == self.shapes[other]):
            return False
        if self.dtypes[one] != self.dtypes[other]:
            return False
        pairs = zip(self._pieces(one), self._pieces(other), strict=True)
        return all(torch.equal(mine, theirs) for (_, _, mine), (_, _, theirs) in pairs)

    def _pieces(self, name: str) -> Iterator[Piece]:
        shape = self.shapes[name]
        rows = shape[0] if shape else 1
        row_bytes = torch.Size(shape).numel() * self.dtypes[name].itemsize // max(rows, 1)
        step = max(1, MAPPED_BYTES // max(row_bytes, 1))
        for first in range(0, rows, step):
            with _open(self.files[name]) as file:
                whole = not shape or rows <= step
                yield name, first, file.get_tensor(name) if whole else file.get_slice(name)[first : first + step]


def _open(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would never be opened
            raise OSError("it is not a file")
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; is the checkpoint complete?") from None
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error  # the error's text would repeat the path
        raise ValueError(f"{path} is not a readable safetensors file ({reason}); copy or export it again") from None


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """The files of an index, with the names of the tensors they should hold. Raises ValueError for an index that is
    damaged or names other places."""
    try:
        weight_map = read_object(index).get("weight_map")
    except FileNotFoundError:
        raise ValueError(f"{index} is a link to a file that does not exist; is the checkpoint complete?") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no readable weight_map of tensors to files; copy it again")
    promised: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A plain file name, without characters that no file name can have: NUL, or half of a surrogate pair.
        if Path(file).name != file or file in ("", "..") or not file.isprintable():
            raise ValueError(f"{index}: {name} lies in {file!r}, which is not a file beside the index")
        names = promised.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    return promised
