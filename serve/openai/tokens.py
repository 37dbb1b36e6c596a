"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes: the tokens that a request with a prompt or a
conversation has, and the text of tokens."""

from typing import Annotated, Any

from pydantic import Field

from attnzoo.models import EmbeddedPrompt
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.openai.answer import check_model
from serve.openai.content import encode_chat
from serve.openai.encoding import encode_text, in_thread
from serve.openai.errors import ApiError, unsupported
from serve.openai.invalid import validated
from serve.openai.json_body import MOST, read_object
from serve.openai.neutral import TOKENS, take_neutral
from serve.openai.protocol import Strict, spell_token
from serve.openai.protocol_chat import ChatMessage


class TokenizeRequest(Strict):
    """Body of POST /tokenize: one of prompt and messages. add_special_tokens: begin a prompt with the begin token, if
    the model uses one, as a completion does. return_token_strs: tokens as texts, too."""

    model: str | None = None
    add_special_tokens: bool | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MOST)]], Field(fail_fast=True)]


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Parses a body. Raises ApiError 400 that names the first field that is wrong, unknown or not supported."""
    values = read_object(body, "prompt or messages")
    take_neutral(values, TOKENS)
    request = validated(
        TokenizeRequest, values, lambda where: list((ChatMessage if len(where) > 1 else TokenizeRequest).model_fields)
    )
    if request.messages is not None and request.add_special_tokens:
        raise unsupported("add_special_tokens", "is for prompts: the chat template writes those of messages")
    if (request.prompt is None) == (request.messages is None):
        both = "both are there" if request.prompt is not None else "neither is there"
        raise ApiError(400, f"give one of prompt and messages; {both}", param="prompt")
    return request


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """The same for tokens."""
    values = read_object(body, "tokens")
    return validated(DetokenizeRequest, values, lambda _: list(DetokenizeRequest.model_fields))


async def tokenize(request: TokenizeRequest, engine: AsyncEngine, config: ServeConfig) -> dict[str, Any]:
    """The tokens of a prompt as a completion has them, or of a conversation as a chat has them. Raises ApiError."""
    _check_model(request.model, config)
    if request.messages is None:
        assert request.prompt is not None
        tokens = await encode_text(request.prompt, engine, "prompt", request.add_special_tokens is not False)
    else:
        if engine.engine.chat_template is None:
            message = f"the model {config.served_name!r} has no chat template; send a prompt"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        told = [message.plain(f"messages[{index}]") for index, message in enumerate(request.messages)]
        _, prompt = await encode_chat(told, engine, "messages")
        if isinstance(prompt, EmbeddedPrompt):
            message = "messages hold parts that are no text, which have no tokens; leave them out"
            raise ApiError(400, message, param="messages")
        tokens = list(prompt)
    spell = engine.engine.tokenizer.token_bytes
    spelled = [spell_token(spell(token)) for token in tokens] if request.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": engine.engine.max_model_len,
        "tokens": tokens,
        "token_strs": spelled,
    }


async def detokenize(request: DetokenizeRequest, engine: AsyncEngine, config: ServeConfig) -> dict[str, Any]:
    """The text of tokens, without control tokens. Raises ApiError."""
    _check_model(request.model, config)
    tokenizer, tokens = engine.engine.tokenizer, request.tokens
    unknown = next((token for token in tokens if token >= tokenizer.vocab_size), None)
    if unknown is not None:
        message = f"tokens has {unknown}, which is outside the vocabulary of {tokenizer.vocab_size}"
        raise ApiError(400, message, param="tokens")
    return {"prompt": await in_thread(len(tokens), tokenizer.decode, tokens)}


def tokenizer_info(engine: AsyncEngine) -> dict[str, Any]:
    """What clients that count tokens by /tokenize want to know, as vLLM tells it."""
    tokenizer = engine.engine.tokenizer
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {
        **{name: None if token is None else tokenizer.spelling(token) for name, token in ids.items()},
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template,
    }


def _check_model(name: str | None, config: ServeConfig) -> None:
    if name is not None:
        check_model(name, config)
