"""Reads and checks prompts: texts, or sequences of integer token ids."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

Prompt = str | Sequence[int]


def read_prompts(prompts: Iterable[Any]) -> list[str | list[int]]:
    """A list of prompts: texts unchanged, token ids as lists. Raises ValueError for anything else."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts[:40]!r} is one text: give a list of prompts, [{prompts[:40]!r}]")
    return [prompt if isinstance(prompt, str) else _tokens(prompt, index) for index, prompt in enumerate(prompts)]


def _tokens(prompt: Any, index: int) -> list[int]:
    if not isinstance(prompt, bytes | bytearray | dict | set):
        try:
            return list(prompt)
        except TypeError:
            pass
    raise ValueError(f"prompts[{index}]={str(prompt)[:40]} is no prompt: give a text, or a list of token ids")


def whole(token: Any) -> int:
    """A token id as a Python int. Raises ValueError for booleans, floats and other types."""
    try:
        if not isinstance(token, bool):
            return operator.index(token)
    except TypeError:
        pass
    raise ValueError(f"prompt token {token!r} is no whole number; give the ids of tokens")


def check_prompt(prompt: Sequence[Any], vocabulary: int) -> None:
    """Raises ValueError for an empty prompt, and for a token id outside the vocabulary of `vocabulary` tokens."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    for token in prompt:
        if not 0 <= whole(token) < vocabulary:
            raise ValueError(f"prompt token {token} is outside the vocabulary of {vocabulary}")
