"""Blocks of few rows, so that the contract's short sequences cross their borders."""

import pytest

from attnzoo.ops.common import row_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK", 5)
