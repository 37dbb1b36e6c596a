"""Reads the header of a GGUF file: its key-value pairs, and where its tensors are.

The package `gguf` keeps numpy arrays for each string, which takes seconds for a vocabulary of 100,000 tokens; this
reader takes a tenth of a second. Layout: "GGUF", version, number of tensors, number of pairs; then the pairs: key,
type, value; then for each tensor its name, axes (fastest first), type and offset. Numbers are little-endian; strings
and arrays begin with their length. The tensors' data follow at the next multiple of the alignment.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRING, ARRAY, AXIS = 8, 9, 10
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of plain numbers, with the format characters of `struct`."""
VERSIONS = (2, 3)


@dataclass(frozen=True)
class GGUFTensor:
    """shape: slowest axis first. kind: GGUF's number of the element type. offset: where its data begin in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """metadata: key -> number, text or list. data: byte of the file where the tensors' data begin. alignment: each
    tensor begins at a multiple of so many bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: int
    alignment: int


def read_gguf(path: Path) -> GGUFFile:
    """Reads the header. Raises ValueError that names the file if it is missing, damaged or not a GGUF file."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise ValueError(f"'{path}' {what}; give a GGUF file")
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"'{path}' is not a GGUF file: it does not begin with 'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parsed(path, data)
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read ({error.strerror})") from None


def _parsed(path: Path, data: mmap.mmap) -> GGUFFile:
    try:
        return GGUFFile(path, *_read(data))
    except (struct.error, UnicodeDecodeError, RecursionError, EOFError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); download it again") from None
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None


def _read(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GGUFTensor], int, int]:
    version, tensor_count, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in VERSIONS:
        order = " (or it is big-endian)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"GGUF version {version}{order} is not supported, only {VERSIONS}; convert the model again")
    metadata = {}
    at = 24
    for _ in range(pairs):
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        if key in metadata:
            raise ValueError(f"the field {key!r} is there twice; convert the model again")
        metadata[key], at = _value(data, at + 4, kind)
    tensors = {}
    for _ in range(tensor_count):
        name, at = _text(data, at)
        (rank,) = struct.unpack_from("<I", data, at)
        axes, at = _numbers(data, at + 4, AXIS, rank)
        kind, offset = struct.unpack_from("<IQ", data, at)
        at += 12
        if name in tensors:
            raise ValueError(f"the tensor {name!r} is there twice; convert the model again")
        tensors[name] = GGUFTensor(tuple(reversed(axes)), kind, offset)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r} is not a number of bytes; convert the model again")
    start = -(-at // alignment) * alignment
    placed = {name: GGUFTensor(t.shape, t.kind, start + t.offset) for name, t in tensors.items()}
    return metadata, placed, start, alignment


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == STRING:
        return _text(data, at)
    if kind != ARRAY:
        values, at = _numbers(data, at, kind, 1)
        return values[0], at
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in NUMBERS:
        return _numbers(data, at, kind, count)
    values = []
    for _ in range(count):
        value, at = _value(data, at, kind)
        values.append(value)
    return values, at


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    start, end = at + 8, at + 8 + size
    if end > len(data):
        raise EOFError(f"a text of {size} bytes at {at} reaches past the end of the file")
    return data[start:end].decode("utf-8"), end


def _numbers(data: mmap.mmap, at: int, kind: int, count: int) -> tuple[list[Any], int]:
    if kind not in NUMBERS:
        raise ValueError(f"value type {kind} at byte {at} is unknown; update attnzoo or convert the model again")
    size = struct.calcsize("<" + NUMBERS[kind]) * count
    if at + size > len(data):
        raise EOFError(f"an array of {size} bytes at {at} reaches past the end of the file")
    return list(struct.unpack_from(f"<{count}{NUMBERS[kind]}", data, at)), at + size
