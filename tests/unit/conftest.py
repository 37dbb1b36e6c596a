"""What several files of unit tests use."""

from collections.abc import Iterator

import pytest

from tests.helpers.chat_endpoint import ChatEndpoint, chat_endpoint


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    """An endpoint of OpenAI's form, over HTTP."""
    with chat_endpoint() as found:
        yield found
