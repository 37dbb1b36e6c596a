"""Pictures in requests: data URLs of PNG, JPEG or WebP become pixels. Nothing is fetched, and nothing is guessed.

The bytes are counted before base64 is decoded, and width, height and colours are read from the header before pixels
are: a small file may claim a picture of any size. The media type decides which reader is used, so that no other format
of the library can be reached.
"""

import binascii
import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnzoo.vision.pillow import import_pillow
from serve.openai.errors import ApiError, short_name

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/jpg": "JPEG", "image/webp": "WEBP"}
"""Readers of the package pillow by media type."""
HEAD = re.compile(r"data:([^;,]{1,64});base64,", re.ASCII | re.IGNORECASE)
COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
"""Modes of pillow that have 8 bits a channel and become RGB without a colour profile."""
MAX_SCANS = 32
"""Most passes over the pixels that a JPEG may ask for; encoders write at most about ten. Each may cost the time of a
whole picture and needs a few bytes."""

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers of a pixel by the colour type of a PNG file."""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(first column, first row, step of columns, step of rows) of an interlaced PNG file."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one picture. max_bytes: of the file; max_side: of width and of height, in pixels; max_pixels: of both
    multiplied."""

    max_bytes: int = 1 << 20
    max_side: int = 4096
    max_pixels: int = 1 << 22

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_side", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def decoded(data_url: Any, where: str, limits: ImageLimits) -> Tensor:
    """The picture, uint8 [3, H, W], turned as its EXIF data says; what is transparent is composed on white. where: the
    field that holds it. Raises ApiError 400 that names the field."""
    pillow = import_pillow()
    image = _opened(data_url, where, limits)
    white = pillow.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return _tensor(pillow.Image.alpha_composite(white, image).convert("RGB"))


def decoded_with_opacity(data_url: Any, where: str, limits: ImageLimits) -> Tensor:
    """As `decoded`, but uint8 [4, H, W] with the opacity last: 255 everywhere for a picture without transparency."""
    return _tensor(_opened(data_url, where, limits))


def _tensor(image: Any) -> Tensor:
    """uint8 [C, H, W]."""
    return torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).contiguous()


def _opened(data_url: Any, where: str, limits: ImageLimits) -> Any:
    """The decoded picture of pillow, in mode RGBA."""
    pillow = import_pillow()
    media, data = _file(data_url, where, limits)
    kind = FORMATS[media]
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise _refused(where, f"is a JPEG of more than {MAX_SCANS} scans; save it again")
    problem = None
    try:
        if kind == "WEBP":  # the library makes room for the pixels of these when it opens them
            problem = _size_problem(*_webp_size(data), limits)
        if problem is None:
            image = pillow.Image.open(io.BytesIO(data), formats=[kind])
            width, height = image.size
            problem = _size_problem(width, height, limits) or _problem(image, kind)
        if problem is None:
            if kind == "PNG" and not _holds_rows(data):  # the library makes up those that are missing
                raise ValueError("rows are missing")
            return pillow.ImageOps.exif_transpose(image).convert("RGBA")
    # What damaged files raise in the library is not one class: OSError, SyntaxError, ValueError, struct.error and more.
    except Exception:
        raise _refused(where, f"cannot be decoded as {media}: the file is of another kind, damaged, or cut") from None
    raise _refused(where, problem)


def _size_problem(width: int, height: int, limits: ImageLimits) -> str | None:
    """What speaks against decoding a picture that says it has this size."""
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        return (
            f"has {width} x {height} pixels; at most {limits.max_pixels} pixels, and {limits.max_side} a side, are "
            "taken: send it smaller"
        )
    return None


def _problem(image: Any, kind: str) -> str | None:
    """What else speaks against decoding a picture of which only the header has been read."""
    if kind != "JPEG" and getattr(image, "n_frames", 1) != 1:  # in a JPEG they are smaller copies, as phones write them
        return "is animated; send one picture"
    if image.mode not in COLOURS:
        return f"has colours of the kind {image.mode!r}; save it as RGB with 8 bits a channel"
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a WebP file's canvas. Raises ValueError where it has none."""
    kind, head = data[12:16], data[20:30]
    if len(head) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if len(head) == 10 and kind == b"VP8L" and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if len(head) == 10 and kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    raise ValueError("no canvas")


def _holds_rows(data: bytes) -> bool:
    """Whether a PNG file has an end, and all of its rows before it. Raises zlib.error for rows that are damaged."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    bits = CHANNELS.get(colour, 1) * depth
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    unpacked, at = zlib.decompressobj(), 8
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        packed = data[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(unpacked.decompress(packed, 1 << 20))
            packed = unpacked.unconsumed_tail
        if name == b"IEND":
            return missing <= 0
        at += 12 + size
    return False


def _file(data_url: Any, where: str, limits: ImageLimits) -> tuple[str, bytes]:
    """(media type, bytes) of a data URL."""
    if not isinstance(data_url, str):
        raise _refused(where, "must be a data URL, a string such as data:image/png;base64,...")
    found = HEAD.match(data_url)
    if found is None:
        raise _refused(
            where,
            f"begins with {short_name(data_url[:24])!r}; give data:image/png;base64,..., since nothing is fetched",
        )
    media = found[1].lower()
    if media not in FORMATS:
        raise _refused(where, f"has the media type {short_name(media)!r}; take one of {', '.join(FORMATS)}")
    length = len(data_url) - found.end()
    if length > (limits.max_bytes + 2) // 3 * 4:
        raise _refused(
            where, f"has about {length // 4 * 3} bytes; at most {limits.max_bytes} are taken: send it smaller"
        )
    try:
        data = binascii.a2b_base64(data_url[found.end() :].encode("ascii"), strict_mode=True)
    except (ValueError, UnicodeEncodeError):
        raise _refused(where, "is not base64 after the comma (RFC 4648, with its padding and no line breaks)") from None
    if len(data) > limits.max_bytes:
        raise _refused(where, f"has {len(data)} bytes; at most {limits.max_bytes} are taken: send it smaller")
    return media, data


def _refused(where: str, what: str) -> ApiError:
    return ApiError(400, f"{where} {what}", param=where, code="invalid_image")
