"""Fonts of emoji: tests that need one are skipped where it is not installed, with what installs it."""

import pytest

from attnzoo.vision.emoji import FONTS


def needs(font: str) -> pytest.MarkDecorator:
    """Skips without the font."""
    found = FONTS[font].find()
    return pytest.mark.skipif(found is None or not found.is_file(), reason=f"needs {FONTS[font].install}")
