"""What several files of this directory share."""

from collections.abc import Iterator

import pytest

from tests.helpers.browser import Browser, browser


@pytest.fixture(scope="module")
def seen() -> Iterator[Browser]:
    """A browser with one page, for all tests of a file."""
    with browser() as found:
        yield found
