"""Prompts and conversations as users give them: one, or a list of them."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from attnzoo.models import EmbeddedPrompt

Prompt = str | Sequence[int]
"""A text, its token ids, or an `attnzoo.models.EmbeddedPrompt` of token ids and embeddings."""
Conversation = Sequence[Mapping[str, Any]]
"""Messages with a role and a content, in their order."""


def as_batch(prompts: Any) -> tuple[list[Prompt], bool]:
    """(list of prompts, whether a single prompt was given). Raises ValueError for anything but text and token ids."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, str | EmbeddedPrompt):
        return [prompts], True
    if isinstance(prompts, Mapping | bytes | bytearray) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts has type {type(prompts).__name__}; give text, token ids, or a list of either")
    if not prompts:
        raise ValueError("prompts is empty; give a text, token ids, or a list of either")
    if all(is_token(item) for item in prompts):
        return [list(map(operator.index, prompts))], True
    batch: list[Prompt] = []
    for index, item in enumerate(prompts):
        item = item.tolist() if hasattr(item, "tolist") else item
        if isinstance(item, str | EmbeddedPrompt):
            batch.append(item)
        elif (
            isinstance(item, Sequence)
            and not isinstance(item, bytes | bytearray)
            and all(is_token(token) for token in item)
        ):
            batch.append(list(map(operator.index, item)))
        else:
            raise ValueError(f"prompts[{index}]={item!r} has type {type(item).__name__}; give text or token ids")
    return batch, False


def is_token(value: Any) -> bool:
    """Whether the value is an integer, including numpy's integers; a bool is not."""
    return not isinstance(value, bool) and hasattr(value, "__index__")


def as_conversations(messages: Any) -> tuple[list[Conversation], bool]:
    """(list of conversations, whether a single one was given). Raises ValueError unless each is a list of mappings with
    a role. The chat template checks which roles exist and whether content is required."""
    many = isinstance(messages, list | tuple) and bool(messages) and all(isinstance(m, list | tuple) for m in messages)
    if not many:
        _check_messages(messages, "messages")
        return [messages], True
    for index, conversation in enumerate(messages):
        _check_messages(conversation, f"messages[{index}]")
    return list(messages), False


def _check_messages(messages: Any, where: str) -> None:
    example = 'a list such as [{"role": "user", "content": "Hello"}]'
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        found = "is empty" if isinstance(messages, Sequence) and not messages else f"has type {type(messages).__name__}"
        raise ValueError(f"{where} {found}; it must be {example}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}[{index}] has type {type(message).__name__}; messages must be {example}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where}[{index}].role={message.get('role')!r} must be a text such as 'user'")


def check_batch_size(batch_size: Any) -> None:
    """Raises ValueError unless it is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
