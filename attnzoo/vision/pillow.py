"""The package that reads and draws pictures; not everyone needs it."""

from typing import Any


def import_pillow() -> Any:
    """The package, with the modules that are used. Raises ValueError that says what to install."""
    try:
        import PIL
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
        import PIL.ImageOps
    except ModuleNotFoundError:
        raise ValueError("pictures are read and drawn by the package pillow: pip install 'attnzoo[vision]'") from None
    return PIL
