"""Pictures in data URLs become pixels, within bounds: nothing is fetched, and nothing is decoded before its size is
known.

A picture is turned as its EXIF says, laid on white where it is transparent, made to fit the model's square, and where
it is no square, padded with grey.
"""

import base64
import binascii
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np

from serve.openai.errors import short_name

FORMATS = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}
"""Kinds of files by the name in their media type, and how each begins."""
HOW = "give data:image/png;base64,... (png, jpeg or webp)"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
"""How Pillow calls pixels of at most 8 bits a channel."""
MAX_SCANS = 64
"""Most scans of a JPEG file; each goes over the whole picture, however few bytes it has."""
GREY, WHITE = (127, 127, 127), (255, 255, 255, 255)
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers of a pixel by the colour type of a PNG file."""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""(first column, first row, step of columns, step of rows) of an interlaced PNG file."""
_PREFIX = re.compile(r"data:image/([a-z0-9.+-]{1,32});base64,", re.IGNORECASE)


@dataclass(frozen=True)
class FileLimits:
    """most_bytes: of a file. most_pixels: width times height, before anything is decoded."""

    most_bytes: int
    most_pixels: int


def pixels_of(url: str, limits: FileLimits, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a data URL. Raises ValueError that says what is wrong, without the data."""
    data, kind = _bytes(url, limits.most_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged metadata; they are not needed
        return _decoded(data, kind, limits.most_pixels, size)


def _bytes(url: str, most: int) -> tuple[bytes, str]:
    """(the file, its kind)."""
    prefix = _PREFIX.match(url[:80])
    if prefix is None:
        begins = short_name(url[:80].split(",")[0])
        raise ValueError(f"{begins!r} is no picture in a data URL, and this server fetches nothing; {HOW}")
    kind = prefix[1].lower()
    if kind not in FORMATS:
        hint = "; the media type is image/jpeg" if kind == "jpg" else f"; {HOW}"
        raise ValueError(f"image/{kind} is not read by this server{hint}")
    encoded = len(url) - prefix.end()
    if encoded * 3 // 4 - 2 > most:
        raise ValueError(
            f"the picture has some {encoded * 3 // 4:,} bytes, above this server's limit of {most:,} (max_image_bytes);"
            " send a smaller one"
        )
    try:
        data = base64.b64decode(url[prefix.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ValueError("what follows base64, is no base64; encode the bytes of the file") from None
    if len(data) > most:
        raise ValueError(
            f"the picture has {len(data):,} bytes, above this server's limit of {most:,} (max_image_bytes); send a "
            "smaller one"
        )
    if not data.startswith(FORMATS[kind]) or (kind == "webp" and data[8:12] != b"WEBP"):
        raise ValueError(f"the data are no {kind} file, as image/{kind} says; name the kind that they are")
    return data, kind


def _decoded(data: bytes, kind: str, most_pixels: int, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    if kind == "jpeg" and data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"the jpeg file has more than {MAX_SCANS} scans; save it as a plain one")
    if kind == "webp":  # Pillow makes room for the pixels of these when it opens them
        _check_size(*_webp_size(data), most_pixels, size)
    damaged = f"the {kind} file is damaged or cut off; send a whole one"
    try:
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"the picture has too many pixels; at most {most_pixels:,} (max_image_pixels)") from None
    except Exception:  # whatever Pillow raises for bytes of anyone
        raise ValueError(damaged) from None
    with image:
        _check_size(*image.size, most_pixels, size)
        if image.mode not in MODES:
            raise ValueError(f"the picture has pixels of the kind {image.mode!r}; save it with 8 bits a channel")
        frames = 1 if kind == "jpeg" else getattr(image, "n_frames", 1)
        if frames != 1:
            raise ValueError(f"the picture has {frames} frames; send one of them")
        if kind == "png" and not _holds_rows(data):  # Pillow makes up those that are missing
            raise ValueError(damaged)
        try:
            image.load()
            _turn(image)
            shown: Image.Image = image
            if image.has_transparency_data:
                shown = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image.convert("RGBA"))
            return np.asarray(ImageOps.pad(shown.convert("RGB"), (size, size), color=GREY))
        except Exception:
            raise ValueError(damaged) from None


def _turn(image: object) -> None:
    """Turns a picture as its EXIF says, in place; what is no EXIF says nothing."""
    from PIL import Image, ImageOps

    assert isinstance(image, Image.Image)
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # the pixels are whole
        return


def _check_size(width: int, height: int, most: int, size: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"the picture has {width} times {height} pixels; send one with some")
    if width * height > most:
        raise ValueError(
            f"the picture has {width} times {height} pixels, above this server's limit of {most:,} (max_image_pixels); "
            "send a smaller one"
        )
    if min(width, height) * size < max(width, height):
        raise ValueError(
            f"the picture has {width} times {height} pixels: of {size} times {size}, which the model sees, its shorter "
            "side would have less than one; cut it"
        )


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
    raise ValueError("the webp file is damaged or cut off; send a whole one")


def _holds_rows(data: bytes) -> bool:
    """Whether a PNG file has an end, and all of its rows before it."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    bits = CHANNELS.get(colour, 1) * depth
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    unpacked, at = zlib.decompressobj(), len(FORMATS["png"])
    while at + 12 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        packed = data[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        while packed and missing > 0:
            try:
                missing -= len(unpacked.decompress(packed, 1 << 20))
            except zlib.error:
                return False
            packed = unpacked.unconsumed_tail
        if name == b"IEND":
            return missing <= 0
        at += 12 + size
    return False
