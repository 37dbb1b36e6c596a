"""The metadata of a GGUF file: its key-value pairs, read without its tensors.

Written here because a vocabulary is some hundred thousand short strings, for each of which a general reader keeps
arrays of numpy: that takes seconds, this a tenth of one. Layout: "GGUF", version, number of tensors, number of pairs,
then pairs of a key, a type and a value; all little-endian, texts and arrays after their length.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values that are plain numbers, as `struct` calls them."""
VERSIONS = (2, 3)


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Key -> number, text or list. Raises ValueError, naming the file, when it is missing, damaged or no GGUF file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' does not exist; give a GGUF file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"'{path}' is not a GGUF file: it does not begin with 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(data)
            except (struct.error, UnicodeDecodeError, RecursionError, EOFError) as error:
                raise ValueError(f"'{path}' is damaged ({error}); download it again") from None
            except ValueError as error:
                raise ValueError(f"'{path}': {error}") from None


def _read(data: mmap.mmap) -> dict[str, Any]:
    version, _tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in VERSIONS:
        order = " (or it is big-endian)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"GGUF version {version}{order} is not supported, only {VERSIONS}; convert the model again")
    metadata = {}
    at = 24
    for _ in range(pairs):
        key, at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    return metadata


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
