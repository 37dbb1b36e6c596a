"""Pictures in requests: what is decoded, and what is refused before anything large is."""

import base64
import contextlib
import io
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from serve.images import ImageLimits, decoded, decoded_with_opacity
from serve.openai.errors import ApiError

LIMITS = ImageLimits(max_bytes=100_000, max_side=512, max_pixels=100_000)


def pixels(channels=3, height=20, width=30):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def file_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def url(data, media="image/png"):
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


PNG = file_of(Image.fromarray(pixels()))
JPEG = file_of(Image.fromarray(pixels()), "JPEG")


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def claims(width, height):
    """A PNG of a few bytes that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def webp(kind, head):
    """The beginning of a WebP file of a kind."""
    body = b"WEBP" + kind + struct.pack("<I", len(head)) + head
    return b"RIFF" + struct.pack("<I", len(body)) + body + bytes(20)


def of_rows(rows, width=4, height=4, interlaced=0, *others):
    """A PNG with these bytes for its rows."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *others, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(32 << 20)))


def test_lossless_pictures_keep_their_pixels():
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = file_of(Image.fromarray(pixels()), kind, **options)
        found = decoded(url(data, f"image/{kind.lower()}"), "image", LIMITS)
        assert found.dtype == torch.uint8
        assert torch.equal(found, torch.from_numpy(pixels()).permute(2, 0, 1))


def test_a_jpeg_is_decoded_under_both_of_its_media_types():
    expected = np.array(Image.open(io.BytesIO(JPEG)).convert("RGB"))
    for media in ("image/jpeg", "image/jpg", "IMAGE/JPEG"):
        assert np.array_equal(decoded(url(JPEG, media), "image", LIMITS).permute(1, 2, 0).numpy(), expected)


def test_what_is_transparent_is_white_or_stays_with_its_opacity():
    rgba = pixels(4)
    rgba[:10, :, 3], rgba[10:, :, 3] = 0, 255
    data = url(file_of(Image.fromarray(rgba)))
    found = decoded(data, "image", LIMITS).permute(1, 2, 0).numpy()
    assert (found[:10] == 255).all()
    assert np.array_equal(found[10:], rgba[10:, :, :3])
    assert np.array_equal(decoded_with_opacity(data, "image", LIMITS).permute(1, 2, 0).numpy(), rgba)
    assert bool((decoded_with_opacity(url(PNG), "image", LIMITS)[3] == 255).all())


def test_palettes_and_greys_become_colours():
    for mode in ("1", "L", "LA", "P"):
        image = Image.fromarray(pixels()).convert(mode)
        expected = np.array(image.convert("RGBA").convert("RGB"))
        assert np.array_equal(decoded(url(file_of(image)), "image", LIMITS).permute(1, 2, 0).numpy(), expected)


def test_a_palette_may_be_transparent():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    found = decoded(url(file_of(image, transparency=1)), "image", LIMITS)
    assert bool((found == 255).all())


def test_a_picture_is_turned_as_its_exif_data_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    found = decoded(url(file_of(Image.fromarray(pixels()), exif=exif)), "image", LIMITS)
    assert torch.equal(found, torch.from_numpy(np.rot90(pixels(), -1).copy()).permute(2, 0, 1))


def scans(count):
    """A JPEG with a scan repeated."""
    at = JPEG.index(b"\xff\xda")
    return JPEG[:at] + JPEG[at:-2] * count + JPEG[-2:]


REFUSED = {
    "none": (None, "must be a data URL"),
    "number": (7, "must be a data URL"),
    "empty": ("", "nothing is fetched"),
    "http": ("http://127.0.0.1/x.png", "nothing is fetched"),
    "file": ("file:///etc/passwd", "nothing is fetched"),
    "not base64": ("data:image/png,abc", "nothing is fetched"),
    "parameter": ("data:image/png;name=x;base64,AAAA", "nothing is fetched"),
    "endless head": ("data:" + "a" * 10_000, "nothing is fetched"),
    "svg": (url(b"<svg/>", "image/svg+xml"), "media type"),
    "gif": (url(file_of(Image.fromarray(pixels()), "GIF"), "image/gif"), "media type"),
    "gif as png": (url(file_of(Image.fromarray(pixels()), "GIF")), "cannot be decoded"),
    "postscript as png": (url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be decoded"),
    "jpeg as png": (url(JPEG), "cannot be decoded"),
    "no bytes": ("data:image/png;base64,", "cannot be decoded"),
    "line break": (url(PNG)[:40] + "\n" + url(PNG)[40:], "is not base64"),
    "umlaut": (url(PNG) + "ä", "is not base64"),
    "no padding": (url(PNG + b"\0" * (4 - len(PNG) % 3)).rstrip("=") + "A", "is not base64"),
    "cut png": (url(PNG[:-200]), "cannot be decoded"),
    "cut jpeg": (url(JPEG[:-200], "image/jpeg"), "cannot be decoded"),
    "cut webp": (url(file_of(Image.fromarray(pixels()), "WEBP")[:-50], "image/webp"), "cannot be decoded"),
    "header alone": (url(PNG[:33]), "cannot be decoded"),
    "too few rows": (url(claims(100, 100)), "cannot be decoded"),
    "too many bytes": (url(PNG + b"\0" * 100_000), "at most 100000"),
    "a byte too many": (url(PNG + b"\0" * (100_001 - len(PNG))), "has 100001 bytes"),
    "bomb": (url(claims(60_000, 60_000)), "cannot be decoded"),
    "wide": (url(claims(513, 2)), "513 x 2 pixels"),
    "many pixels": (url(claims(400, 400)), "400 x 400 pixels"),
    "16 bits": (url(file_of(Image.fromarray(np.zeros((4, 4), np.uint16)))), "'I;16'"),
    "inks": (url(file_of(Image.new("CMYK", (4, 4)), "JPEG"), "image/jpeg"), "'CMYK'"),
    "a png of whole rows, but too few": (url(of_rows(bytes(13 * 3))), "cannot be decoded"),
    "an interlaced png of too few rows": (url(of_rows(bytes(13 * 4), 4, 4, 1)), "cannot be decoded"),
    "png without an end": (url(PNG[:-12]), "cannot be decoded"),
    "png of noise": (url(PNG[:60] + b"\x55" * 200), "cannot be decoded"),
    "jpeg of noise": (url(JPEG[:20] + b"\x55" * 200, "image/jpeg"), "cannot be decoded"),
    "text bomb": (url(of_rows(bytes(52), 4, 4, 0, TEXT)), "cannot be decoded"),
    "no width": (url(of_rows(b"", 0, 4)), "cannot be decoded"),
    "sound": (url(b"RIFF\0\0\0\0WAVEfmt ", "image/webp"), "cannot be decoded"),
    "webp without a head": (url(b"RIFF\0\0\0\0WEBPVP8X", "image/webp"), "cannot be decoded"),
    "webp of another kind": (url(webp(b"VP9 ", bytes(20)), "image/webp"), "cannot be decoded"),
    "webp bomb": (url(webp(b"VP8X", b"\0\0\0\0" + b"\x7f\x3e\0" * 2), "image/webp"), "16000 x 16000 pixels"),
    "webp bomb without loss": (url(webp(b"VP8L", b"\x2f\xff\xff\xff\x0f"), "image/webp"), "16384 x 16384 pixels"),
    "webp bomb with loss": (
        url(webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"), "image/webp"),
        "16383 x 16383 pixels",
    ),
    "scans": (url(scans(33), "image/jpeg"), "scans"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field_and_the_way_out(name):
    value, what = REFUSED[name]
    with pytest.raises(ApiError) as failed:
        decoded(value, "background", LIMITS)
    assert (failed.value.status, failed.value.param) == (400, "background")
    assert what in failed.value.message
    assert len(failed.value.message) < 400


def test_animated_pictures_are_refused():
    frames = [Image.fromarray(pixels()), Image.fromarray(pixels()[::-1].copy())]
    for kind in ("PNG", "WEBP"):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(ApiError, match="animated"):
            decoded(url(data, f"image/{kind.lower()}"), "image", LIMITS)


def test_a_claimed_size_takes_no_memory():
    tracemalloc.start()
    large = b"\0\0\0\0" + (4999).to_bytes(3, "little") * 2
    for data in (url(claims(5_000, 5_000)), url(webp(b"VP8X", large), "image/webp")):
        with pytest.raises(ApiError, match="5000 x 5000"):
            decoded(data, "image", LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_limits_are_checked():
    for name in ("max_bytes", "max_side", "max_pixels"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            ImageLimits(**{name: 0})


def test_an_interlaced_picture_is_whole_with_the_rows_of_all_passes():
    for width, height, rows in ((1, 1, 4), (3, 5, 55), (4, 4, 55), (9, 8, 231)):
        assert not decoded(url(of_rows(bytes(rows), width, height, 1)), "image", LIMITS).any()
        with pytest.raises(ApiError, match="cannot be decoded"):
            decoded(url(of_rows(bytes(rows - 1), width, height, 1)), "image", LIMITS)


def test_a_jpeg_with_smaller_copies_as_phones_write_it_is_one_picture():
    whole, copy = Image.fromarray(pixels()), Image.fromarray(pixels()[::2, ::2].copy())
    data = file_of(whole, "MPO", save_all=True, append_images=[copy])
    assert decoded(url(data, "image/jpeg"), "image", LIMITS).shape == (3, 20, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_whatever_bytes_are_changed_there_is_a_picture_or_a_refusal(kind):
    random, whole = np.random.default_rng(0), file_of(Image.fromarray(pixels()), kind)
    for _ in range(100):
        data = bytearray(whole)
        for at in random.integers(0, len(data), int(random.integers(1, 6))):
            data[at] = random.integers(256)
        with contextlib.suppress(ApiError):
            found = decoded(url(bytes(data), f"image/{kind.lower()}"), "image", LIMITS)
            assert found.shape[1] * found.shape[2] <= LIMITS.max_pixels


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"by the package pillow: pip install 'attnzoo\[vision\]'"):
        decoded("data:image/png;base64,AAAA", "url", ImageLimits())
