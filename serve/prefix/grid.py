"""Where prompts are cut: at places that depend on the tokens before them alone.

A pass through the model rounds by how many tokens it has. Prompts that begin with the same tokens are cut at the same
places, so that what was kept of one is, bit for bit, what the other would compute.
"""

import hashlib
from array import array
from collections.abc import Collection, Sequence

LEAST = 4
"""A turn ends a cell that is at least this part of a whole one; many short turns would make many short passes."""
OPENING = 16
"""The first turn of at least so many tokens always ends a cell: conversations share their system prompt, and go on
differently behind it. A start token, which may be an end token too, is no turn."""


def cut(prompt: Sequence[int], ends: Collection[int], cell: int) -> tuple[int, ...]:
    """Ends of a prompt's cells, ascending: each has `cell` tokens, or fewer where a turn ends with one of the tokens
    `ends`, or the prompt."""
    found, start = [], 0
    opening = next((end for end in range(OPENING, len(prompt)) if prompt[end - 1] in ends), 0)
    while start < len(prompt):
        stop = min(start + cell, len(prompt))
        turns = range(start + max(1, cell // LEAST), stop)
        turn = next((end for end in turns if prompt[end - 1] in ends), stop)
        start = opening if start < opening < turn else turn
        found.append(start)
    return tuple(found)


def digests(prompt: Sequence[int], borders: Sequence[int], salt: bytes) -> tuple[bytes, ...]:
    """A digest for each border of all tokens before it, of the borders there, and of the salt (at most 64 bytes)."""
    found, before, start = [], b"", 0
    for border in borders:
        cell = array("q", prompt[start:border]).tobytes()
        before = hashlib.blake2b(before + cell, digest_size=16, key=salt).digest()
        found.append(before)
        start = border
    return tuple(found)
