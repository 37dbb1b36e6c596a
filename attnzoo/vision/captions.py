"""Captions of scenes, their words as ids, and where in a caption an object is named."""

from collections.abc import Iterable, Sequence

from attnzoo.vision.backgrounds import COLOURS, TEXTURES
from attnzoo.vision.emoji import EMOJI, with_article
from attnzoo.vision.questions import NUMBERS
from attnzoo.vision.scenes import Scene
from attnzoo.vision.styles import STYLES

NONE = -1
"""The id of no word."""


def caption(scene: Scene, style: str, names: Sequence[str]) -> str:
    """What is in a picture, such as "a sketch of an apple and two dogs on a blue checked background"."""
    kinds = list(dict.fromkeys(placed.kind for placed in scene.objects))
    told = [phrase(names[kind], scene.count(kind)) for kind in kinds]
    return f"a {style} of {' and '.join(told)} on {background_phrase(scene.colour, scene.texture)}"


def longest_caption(objects: int) -> int:
    """Words of the longest caption of a scene with so many objects."""
    return len(["a", "style", "of", "on", "a", "colour", "texture", "background"]) + 2 * objects + (objects - 1)


def phrase(name: str, count: int) -> str:
    """ "an apple", "two apples"."""
    return with_article(name) if count == 1 else f"{NUMBERS[count]} {EMOJI[name].plural}"


def background_phrase(colour: str, texture: str) -> str:
    """ "a blue checked background"."""
    return f"a {colour} {texture} background"


class CaptionWords:
    """The words of captions by id. words: None for those of every caption that `caption` makes of the known emoji."""

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = tuple(_words(EMOJI, STYLES, len(NUMBERS) - 1) if words is None else words)
        self._ids = {word: number for number, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError("words holds a word twice")

    @classmethod
    def of(cls, kinds: Iterable[str], styles: Iterable[str], most_objects: int) -> "CaptionWords":
        """Those of the captions of scenes of these kinds of emoji and styles, with so many objects at most."""
        return cls(_words(kinds, styles, most_objects))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int) -> list[int]:
        """`length` ids, `NONE` after the caption's last word; an empty text has no words. Raises ValueError for unknown
        words, and for a caption of more words."""
        words = text.split()
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ValueError(f"the caption {text!r} has the word {unknown[0]!r}; known are {', '.join(self.words)}")
        if len(words) > length:
            raise ValueError(f"the caption {text!r} has {len(words)} words; the model reads {length}")
        return [self._ids[word] for word in words] + [NONE] * (length - len(words))


def words_of(text: str, part: str) -> tuple[int, int]:
    """[start, stop) of the words of `part` in a caption. Raises ValueError where it is not there, or twice."""
    words, wanted = text.split(), part.split()
    found = [at for at in range(len(words) - len(wanted) + 1) if wanted and words[at : at + len(wanted)] == wanted]
    if len(found) != 1:
        raise ValueError(f"{part!r} stands {len(found)} times in {text!r}; name words that stand there once")
    return found[0], found[0] + len(wanted)


def _words(kinds: Iterable[str], styles: Iterable[str], most_objects: int) -> list[str]:
    known = {"a", "an", "and", "of", "on", "background", *NUMBERS[2 : most_objects + 1], *styles, *COLOURS, *TEXTURES}
    for name in kinds:
        known |= {name, EMOJI[name].plural}
    return sorted(known)
