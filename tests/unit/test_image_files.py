"""Pictures from data URLs: what they become, and hostile files, none of which is decoded beyond the limits."""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from serve.modalities.image_files import FileLimits, pixels_of
from tests.helpers.picture_models import SIZE, file_of, some_picture, url_of

LIMITS = FileLimits(most_bytes=20_000, most_pixels=10_000)


def read(data: bytes, kind: str = "png", limits: FileLimits = LIMITS) -> np.ndarray:
    return pixels_of(url_of(data, kind), limits, SIZE)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *others: bytes, rows: bytes | None = None) -> bytes:
    """A black picture that says this size, of rows that may be others."""
    rows = zlib.compress(bytes(height * (width * 3 + 1))) if rows is None else rows
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *others, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def webp(width: int, height: int) -> bytes:
    """The head of a file whose canvas has this size."""
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_picture_of_the_models_size_comes_as_it_is(kind):
    picture = some_picture()
    assert np.array_equal(read(file_of(picture, kind), kind), picture)
    url = url_of(file_of(picture)).replace("data:image/png", "DATA:Image/PNG")
    assert np.array_equal(pixels_of(url, LIMITS, SIZE), picture)


def test_other_sizes_fit_into_the_square_on_grey_and_jpeg_is_near():
    picture = some_picture()
    near = read(file_of(picture, "jpeg", quality=95, subsampling=0), "jpeg").astype(int)
    assert np.abs(near - picture).mean() < 4
    wide = read(file_of(some_picture(width=64, height=32)))
    assert wide.shape == (SIZE, SIZE, 3)
    assert (wide[: SIZE // 4 - 1] == 127).all()
    assert (wide[-SIZE // 4 + 1 :] == 127).all()
    assert wide[SIZE // 2].std() > 1


def test_exif_turns_and_what_is_transparent_is_white():
    picture = some_picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for kind in ("png", "webp"):
        assert np.array_equal(read(file_of(picture, kind, exif=exif), kind), np.rot90(picture, -1))
    alpha = np.full((SIZE, SIZE, 1), 255, np.uint8)
    alpha[:8] = 0
    clear = Image.fromarray(np.concatenate([picture, alpha], axis=2))
    for kind in ("png", "webp"):
        seen = read(file_of(clear, kind, **({"exact": True} if kind == "webp" else {})), kind)
        assert (seen[:8] == 255).all()
        assert np.array_equal(seen[8:], picture[8:])
    palette = Image.fromarray(picture).quantize(8)
    data = io.BytesIO()
    palette.save(data, "PNG", transparency=palette.getpixel((0, 0)))
    assert (read(data.getvalue())[0, 0] == 255).all()
    for columns in (1, 3, 9, SIZE):  # interlaced, as few programs write them
        deep = png(columns, SIZE)
        turned = deep[:28] + b"\1" + deep[29:]
        head = turned[12:29]
        turned = turned[:29] + struct.pack(">I", zlib.crc32(head)) + turned[33:]
        extra = zlib.compress(bytes(SIZE * (SIZE * 3 + 9)))
        at = turned.index(b"IDAT") - 4
        turned = turned[:at] + chunk(b"IDAT", extra) + chunk(b"IEND", b"")
        assert not read(turned)[:, SIZE // 2].any()
    for mode in ("L", "1", "LA", "P", "CMYK"):
        kind = "jpeg" if mode == "CMYK" else "png"
        assert read(file_of(Image.fromarray(picture).convert(mode), kind), kind).shape == (SIZE, SIZE, 3)


def frames(kind: str) -> bytes:
    some = [Image.fromarray(some_picture(seed)) for seed in range(3)]
    return file_of(some[0], kind, save_all=True, append_images=some[1:])


def progressive(scans: int) -> bytes:
    """A JPEG file whose last scan comes again and again."""
    data = file_of(some_picture(), "jpeg", progressive=True)
    at = data.rfind(b"\xff\xda")
    return data[:-2] + data[at:-2] * scans + data[-2:]


PNG, JPEG, WEBP = (file_of(some_picture(), kind) for kind in ("png", "jpeg", "webp"))
BOMB = png(60_000, 60_000, rows=zlib.compress(bytes(1000)))
TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(32 << 20)))
DEEP = Image.fromarray(np.zeros((SIZE, SIZE), np.uint16))
BASE = "data:image/png;base64,"
HOSTILE = {
    "a web address": ("https://example.com/a.png", "'https://example.com/a.png' is no picture in a data URL"),
    "a file": ("file:///etc/passwd", "fetches nothing; give data:image/png"),
    "nothing": ("", "is no picture in a data URL"),
    "a long address": ("https://" + "a" * 9999, r"https://a{56}\.\.\.' is no picture"),
    "no base64 mark": ("data:image/png,abc", "is no picture in a data URL"),
    "another type": ("data:text/html;base64,PGI+", "'data:text/html;base64' is no picture"),
    "a vector picture": ("data:image/svg+xml;base64,PHN2Zz4=", r"image/svg\+xml is not read"),
    "a gif": ("data:image/gif;base64,R0lGODlh", "image/gif is not read"),
    "jpg": ("data:image/jpg;base64,AAAA", "the media type is image/jpeg"),
    "no data": (BASE, "are no png file"),
    "no letters of base64": (BASE + "@@@@", "is no base64"),
    "no ascii": (BASE + "é" * 8, "is no base64"),
    "lines in base64": (BASE + "iVBO\nRw0K", "is no base64"),
    "half a group": (BASE + "iVBORw0KG", "is no base64"),
    "too many bytes": (BASE + "A" * 40_000, r"has some 30,000 bytes, above this server's limit of 20,000 \(max_image"),
    "jpeg as png": (url_of(JPEG, "png"), "are no png file, as image/png says"),
    "png as webp": (url_of(PNG, "webp"), "are no webp file"),
    "a sound in riff": (url_of(b"RIFF\0\0\0\0WAVEfmt ", "webp"), "are no webp file"),
    "a text": (url_of(b"<?php echo 1; ?>"), "are no png file"),
    "a head alone": (url_of(PNG[:8]), "png file is damaged or cut off"),
    "a cut png": (url_of(PNG[: len(PNG) // 2]), "png file is damaged or cut off"),
    "a png without rows": (url_of(png(SIZE, SIZE, rows=b"")), "png file is damaged or cut off"),
    "a png of few rows": (url_of(png(SIZE, SIZE, rows=zlib.compress(bytes(97)))), "png file is damaged or cut off"),
    "a png without an end": (url_of(PNG[:-12]), "png file is damaged or cut off"),
    "a png of noise": (url_of(PNG[:60] + b"\x55" * 200), "png file is damaged or cut off"),
    "a cut jpeg": (url_of(JPEG[: len(JPEG) // 2], "jpeg"), "jpeg file is damaged or cut off"),
    "a jpeg of noise": (url_of(JPEG[:20] + b"\x55" * 200, "jpeg"), "jpeg file is damaged or cut off"),
    "a cut webp": (url_of(WEBP[: len(WEBP) // 2], "webp"), "webp file is damaged or cut off"),
    "a webp without a head": (url_of(b"RIFF\0\0\0\0WEBPVP8X", "webp"), "webp file is damaged or cut off"),
    "a webp of another kind": (url_of(b"RIFF\0\0\0\0WEBPVP9 " + bytes(40), "webp"), "webp file is damaged"),
    "a bomb": (url_of(BOMB), "too many pixels|60000 times 60000 pixels, above this server's limit of 10,000"),
    "a small bomb": (url_of(png(101, 100)), r"101 times 100 pixels, above .* 10,000 \(max_image_pixels\)"),
    "a webp bomb": (url_of(webp(16_000, 16_000), "webp"), "16000 times 16000 pixels"),
    "a webp bomb of VP8L": (
        url_of(b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f\xff\xff\xff\x0f" + bytes(9), "webp"), "16384 times 16384 pixels",
    ),
    "a webp bomb of VP8": (
        url_of(b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(9), "webp"), "16383 times",
    ),
    "a text bomb": (url_of(png(SIZE, SIZE, TEXT)), "max_image_bytes|damaged"),
    "no width": (url_of(png(0, 9)), "damaged|0 times 9"),
    "a line": (url_of(png(5000, 1)), "5000 times 1 pixels.* its shorter side would have less than one"),
    "frames of png": (url_of(frames("png")), "3 frames; send one of them"),
    "frames of webp": (url_of(frames("webp"), "webp"), "3 frames; send one of them"),
    "many scans": (url_of(progressive(70), "jpeg"), "more than 64 scans"),
    "deep": (url_of(file_of(DEEP)), "pixels of the kind 'I;16'; save it with 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused_within_the_limits(name):
    url, said = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said) as refused:
            pixels_of(url, LIMITS, SIZE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(refused.value)
    assert len(message) < 250
    assert url[100:180] not in message or len(url) < 180
    assert peak < 4 << 20


def test_a_text_bomb_of_few_bytes_is_not_unpacked():
    limits = FileLimits(most_bytes=1 << 20, most_pixels=10_000)
    data = png(SIZE, SIZE, TEXT)
    assert len(data) < limits.most_bytes
    with pytest.raises(ValueError, match="damaged"):
        read(data, limits=limits)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_whatever_bytes_are_changed_there_is_a_picture_or_a_reason(kind):
    random, whole = np.random.default_rng(0), file_of(some_picture(), kind)
    for _ in range(200):
        data = bytearray(whole)
        for at in random.integers(0, len(data), int(random.integers(1, 6))):
            data[at] = random.integers(256)
        cut = bytes(data[: int(random.integers(1, 2 * len(data)))])
        with contextlib.suppress(ValueError):
            assert read(cut, kind).shape == (SIZE, SIZE, 3)
