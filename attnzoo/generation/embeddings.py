"""Messages of a chat whose content holds embeddings beside text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnzoo.generation.inputs import Conversation
from attnzoo.models import Embedded, EmbeddedPrompt
from attnzoo.tokenizer.chat_tokens import ChatEncoder, join_content, new_mark

KIND = "embeddings"
"""Type of the part, and its field: {"type": "embeddings", "embeddings": tensor [rows, model_dim]}."""


def encode_conversation(chat: ChatEncoder, messages: Conversation) -> tuple[Conversation, Sequence[int]]:
    """(the messages with texts as contents, the prompt). Raises ValueError as `ChatEncoder.encode`, and for a part
    beside embeddings that is neither text nor embeddings."""
    plain, embedded = with_marks(messages)
    if not embedded:
        return messages, chat.encode(messages)
    pieces = chat.encode_around(chat.template.render(plain), list(embedded))
    return plain, EmbeddedPrompt.around(pieces, list(embedded.values()))


def with_marks(messages: Conversation) -> tuple[list[Mapping[str, Any]], dict[str, Embedded]]:
    """(messages in which a mark stands for each part of embeddings, the embeddings by mark, called embeddings[0] and so
    on). Contents without embeddings stay as they are. Raises ValueError that names the part."""
    found: list[Mapping[str, Any]] = []
    embedded: dict[str, Embedded] = {}
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list | tuple) or not any(map(_is_embeddings, content)):
            found.append(message)
            continue
        parts = []
        for number, part in enumerate(content):
            where = f"messages[{index}].content[{number}]"
            if _is_embeddings(part):
                parts.append(mark := new_mark())
                embedded[mark] = _read(part, f"{KIND}[{len(embedded)}]", where)
            elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                raise ValueError(
                    f"{where}={part!r} stands beside embeddings, and is neither of them nor text; write "
                    '{"type": "text", "text": ...}'
                )
        found.append({**message, "content": join_content(parts, embedded)})
    return found, embedded


def _is_embeddings(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == KIND


def _read(part: Mapping[str, Any], name: str, where: str) -> Embedded:
    given: Any = part.get(KIND)
    try:
        return replace(given, name=given.name or name) if isinstance(given, Embedded) else Embedded(given, name=name)
    except ValueError as error:
        raise ValueError(f"{where}.{KIND}: {error}") from None
