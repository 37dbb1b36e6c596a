"""Contents of messages become a prompt: texts as tokens, parts of other kinds as embeddings between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnzoo.models import Embedded, EmbeddedPrompt
from attnzoo.tokenizer.chat_tokens import join_content, new_mark
from serve.async_engine import AsyncEngine
from serve.faults import log, message
from serve.modalities.base import KINDS, MAX_PARTS, Content, Modality
from serve.openai.encoding import in_data_thread, in_thread, too_long
from serve.openai.errors import MAX_QUOTED, ApiError, unsupported
from serve.openai.protocol_chat import DataPart
from serve.request import ContextLengthError

MESSAGE_CHARACTERS = 16
"""Characters added to a message's length, because the chat template writes its role and its end."""

Modalities = Mapping[str, Modality]
Plain = list[dict[str, Any]]
"""Messages whose contents are texts; marks stand in them for other parts."""


async def encode_chat(
    messages: Sequence[Mapping[str, Any]], engine: AsyncEngine, param: str
) -> tuple[Plain, Sequence[int]]:
    """(the messages with texts as contents, their prompt). Raises ApiError that names the field `param` or a part."""
    most, modalities = engine.engine.max_model_len, engine.engine.modalities
    if len(messages) > most:
        text = f"{param} holds {len(messages)} messages, and this model's context is {most} tokens; send fewer"
        raise ApiError(400, text, param=param, code="context_length_exceeded")
    plain, parts = with_marks(messages, modalities)
    check_parts(list(parts.values()), modalities, param)
    read = await in_data_thread(_read, list(parts.values()), modalities) if parts else []
    size = sum(len(one["content"]) + MESSAGE_CHARACTERS for one in plain)
    rows = sum(content.rows for content in read)
    try:
        pieces = await in_thread(size, engine.engine.encoder.conversation, plain, list(parts), rows)
    except ContextLengthError as error:
        raise too_long(error, param) from None
    except ValueError as error:
        raise ApiError(400, str(error)[:MAX_QUOTED], param=param, code="chat_template_error") from None
    if not parts:
        return plain, pieces[0]
    embedded = await in_data_thread(_encoded, list(parts.values()), read, modalities)
    return plain, EmbeddedPrompt.around(pieces, embedded)


def with_marks(messages: Sequence[Mapping[str, Any]], modalities: Modalities) -> tuple[Plain, dict[str, DataPart]]:
    """(the messages with texts as contents, with a mark for each part that is no text; the parts by mark)."""

    def later(part: str | DataPart) -> bool:
        return isinstance(part, str) or part.kind not in modalities or not modalities[part.kind].leads

    parts: dict[str, DataPart] = {}
    plain = []
    for one in messages:
        content = one["content"]
        if not isinstance(content, str):
            texts = []
            for part in sorted(content, key=later):
                if isinstance(part, DataPart):
                    parts[mark := new_mark()] = part
                    texts.append(mark)
                else:
                    texts.append(part)
            content = join_content(texts, parts)
        plain.append({**one, "content": content})
    return plain, parts


def check_parts(parts: Sequence[DataPart], modalities: Modalities, param: str) -> None:
    """Raises ApiError for too many parts, and for one of a kind that the served model does not take."""
    for part in parts:
        if part.kind not in modalities:
            what = f"is of type {part.kind}, which this server's model does not take: {KINDS[part.kind]}; send text"
            raise unsupported(part.where, what)
    if len(parts) > MAX_PARTS:
        text = f"{param} holds {len(parts)} parts that are no text, and at most {MAX_PARTS} are possible; send fewer"
        raise ApiError(400, text, param=param)
    for kind, modality in modalities.items():
        some = [part for part in parts if part.kind == kind]
        if len(some) > modality.most:
            what = f"{param} holds {len(some)} parts of type {kind}, and this server takes {modality.most}; send fewer"
            raise ApiError(400, what, param=some[modality.most].where)
        late = next((part for part in some if modality.leads and not part.where.startswith(f"{param}[0].")), None)
        if late is not None:
            what = "is not in the first message, where this model has learned to look at them; begin a conversation"
            raise ApiError(400, f"{late.where} of type {kind} {what} with it", param=late.where)


def _read(parts: Sequence[DataPart], modalities: Modalities) -> list[Content]:
    return [modalities[part.kind].read(part.value, f"{part.where}.{part.kind}") for part in parts]


@torch.inference_mode()
def _encoded(parts: Sequence[DataPart], read: Sequence[Content], modalities: Modalities) -> list[Embedded]:
    """The embeddings of each part, called image_url[0] and so on by its kind. Raises ApiError 500 where that fails."""
    counts: dict[str, int] = {}
    found = []
    for part, content in zip(parts, read, strict=True):
        number = counts[part.kind] = counts.get(part.kind, -1) + 1
        try:
            found.append(Embedded(modalities[part.kind].encode(content), name=f"{part.kind}[{number}]"))
        except Exception as failure:  # whatever an encoder raises, the request must get an answer
            log(f"a part of type {part.kind} failed", failure)
            raise ApiError(500, message(failure), param=part.where, code="request_failed") from None
    return found
