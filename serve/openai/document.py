"""The OpenAPI document: every path with its requests and answers, errors included."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from attnzoo.attention.edits import Edit, Read
from attnzoo.attention.edits.wire import KINDS
from serve.clinical import replies
from serve.clinical.notes import replies as notes
from serve.clinical.notes.protocol import NotesRequest
from serve.clinical.protocol import BundleOptions, PredictRequest
from serve.drawing import protocol as drawing_protocol
from serve.drawing import replies as drawn
from serve.modalities.base import Modality
from serve.openai import answers
from serve.openai.attention import MAX_ITEMS
from serve.openai.neutral import TOKENS, Values
from serve.openai.protocol import CompletionRequest, GenerationRequest
from serve.openai.protocol_chat import ChatMessage, ChatRequest, content_schema
from serve.openai.tokens import DetokenizeRequest, TokenizeRequest

VERSION = "3.1.0"
REFUSALS = {
    400: "A field is wrong, unknown or not supported, or the prompt does not fit the model; `param` names the field",
    401: "The API key is missing or wrong, where the server has one",
    403: "The request is for another host or from a page of another",
    404: "No such path or model",
    405: "The path is known and the method is not allowed",
    408: "The request did not arrive in time",
    413: "The body is too large",
    415: "The body is neither application/json nor, for /v1/predict, application/fhir+json, or in a coding of its own",
    429: "The server is at its limit; try again after `Retry-After` seconds",
    431: "The headers are too large",
    500: "The server failed; it was not the request's fault",
    503: "The server takes no requests now; try again after `Retry-After` seconds",
}
"""Error statuses and their meanings. Some depend on the server's configuration."""
DRAWING = (
    ("/v1/images/generations", "images", drawing_protocol.ImageRequest, drawing_protocol.NEUTRAL),
    ("/v1/images/compose", "compose", drawing_protocol.ComposeRequest, drawing_protocol.NEUTRAL_OF_COMPOSE),
)
"""Paths of a diffusion model with the names of their operations, their requests, and the fields that these refuse."""
ONE_OF = ("prompt", "messages")
"""Fields of which /tokenize takes one."""
NEEDS = {"stream_options": "stream", "top_logprobs": "logprobs"}
"""Fields that are allowed only if another field is true."""
DONE = "Server-sent events: `data: ` and the JSON of one {name} each, then `data: [DONE]`; after a failure an ErrorBody"


class ModelList(answers.Reply):
    """The models of the server: a language model, clinical ones, a diffusion model, or several of these."""

    object: Literal["list"]
    data: Annotated[
        list[answers.ModelCard | replies.ClinicalCard | notes.NoteCard | drawn.DiffusionCard], Field(min_length=1)
    ]


def document(
    title: str, modalities: Mapping[str, Modality] | None, *, clinical: bool = False, drawing: bool = False
) -> dict[str, Any]:
    """The OpenAPI document as a dictionary, of a server with these kinds of models. modalities: what reads parts of
    messages beside text, None: there is no language model."""
    card = {"anyOf": [_ref("ModelCard"), _ref("ClinicalCard"), _ref("NoteCard"), _ref("DiffusionCard")]}
    found: dict[str, Any] = answers.schemas((*answers.REPLIES, ModelList))
    paths: dict[str, Any] = {}
    if modalities is not None:
        found |= {**_requests(CompletionRequest), **_requests(ChatRequest), **_token_requests()}
        _add_parts(found, modalities.values())
        paths |= _language()
    if clinical:
        found |= {**answers.schemas((*replies.REPLIES, *notes.REPLIES, PredictRequest, NotesRequest, FhirResource))}
        paths |= {"/v1/predict": {"post": _predict()}}
    if drawing:
        found |= answers.schemas(drawn.REPLIES)
        for path, name, kind, neutral in DRAWING:
            schemas = answers.schemas((kind,))
            for field, values in neutral.items():
                schemas[kind.__name__]["properties"][field] = {"anyOf": _neutral(values), "default": None}
            schemas[kind.__name__]["dependentSchemas"] = {"preview_every": _only_with("preview_every", "stream")}
            found |= schemas
            paths |= {path: {"post": _generate(name, kind, "ImageList", "ImageStep")}}
    return {
        "openapi": VERSION,
        "info": {"title": title, "version": "1"},
        "paths": {
            **paths,
            "/v1/models": {"get": {"operationId": "models", **_get("The models", _ref("ModelList"))}},
            "/v1/models/{model_id}": {"get": {"operationId": "model", **_get("One model", card, "model_id")}},
            "/health": {"get": {"operationId": "health", **_get("Whether the server is well", _ref("Health"))}},
            "/ready": {"get": {"operationId": "ready", **_get("Whether it takes requests", _ref("Health"))}},
            "/version": {"get": {"operationId": "version", **_get("The version", _ref("Version"))}},
            "/metrics": {"get": {"operationId": "metrics", **_text("Metrics in the format of Prometheus")}},
        },
        "components": {"schemas": found, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _language() -> dict[str, Any]:
    """The paths of a language model."""
    return {
        "/v1/completions": {"post": _generate("completions", CompletionRequest, "Completion", "Completion")},
        "/v1/chat/completions": {
            "post": _generate("chat_completions", ChatRequest, "ChatCompletion", "ChatCompletionChunk")
        },
        "/tokenize": {"post": _post("tokenize", "The tokens of a prompt", "TokenizeRequest", "TokenList")},
        "/detokenize": {"post": _post("detokenize", "The text of tokens", "DetokenizeRequest", "TokenText")},
        "/tokenizer_info": {"get": {"operationId": "tokenizer_info", **_get("The tokenizer", _ref("TokenizerInfo"))}},
        "/v1/attention/{map_id}": {"get": {"operationId": "attention_map", **_file("An attention map", "map_id")}},
    }


class FhirResource(BaseModel):
    """A resource of FHIR R4."""

    resourceType: str


def _predict() -> dict[str, Any]:
    """The path of clinical models."""
    resource = {"application/fhir+json": {"schema": _ref("FhirResource")}}
    events = {"type": "string", "description": DONE.format(name="HourEvent"), "x-event": _ref("HourEvent")}
    content = {**_json("PredictionList", "LabelList"), "text/event-stream": {"schema": events}, **resource}
    query = [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in BundleOptions.model_json_schema()["properties"].items()
    ]
    return {
        "operationId": "predict",
        "summary": "Risks of patients, at once or after each hour, or labels of their texts; a FHIR bundle takes its "
        "options from the query",
        "parameters": query,
        "requestBody": {"required": True, "content": {**_json("PredictRequest", "NotesRequest"), **resource}},
        "responses": {"200": {"description": "The risks", "content": content}, **_refusals()},
    }


def _generate(name: str, request: type[BaseModel], whole: str, chunk: str) -> dict[str, Any]:
    events = {"type": "string", "description": DONE.format(name=chunk), "x-event": _ref(chunk)}
    content = {**_json(whole), "text/event-stream": {"schema": events}}
    return {
        "operationId": name,
        "summary": f"{whole} of what is sent, at once or as it comes",
        "requestBody": {"required": True, "content": _json(request.__name__)},
        "responses": {
            "200": {"description": "The answer, or with `stream` its events", "content": content},
            **_refusals(),
        },
    }


def _post(name: str, summary: str, request: str, answer: str) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {"200": {"description": summary, "content": _json(answer)}, **_refusals()},
    }


def _get(summary: str, schema: dict[str, Any], parameter: str | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": content}, **_refusals()},
    }
    if parameter is not None:
        place = {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
        found["parameters"] = [place]
    return found


def _file(summary: str, parameter: str) -> dict[str, Any]:
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    answer = {"description": f"{summary}, a .npy file", "content": content}
    place = {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
    return {"summary": summary, "parameters": [place], "responses": {"200": answer, **_refusals()}}


def _text(summary: str) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}}
    answer = {"description": summary, "content": content}
    return {"summary": summary, "responses": {"200": answer, **_refusals()}}


def _refusals() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status, meaning in REFUSALS.items():
        found[str(status)] = {"description": meaning, "content": _json("ErrorBody")}
        if status in (429, 503):
            retry = {"description": "Seconds to wait", "schema": {"type": "integer"}, "required": False}
            found[str(status)]["headers"] = {"Retry-After": retry}
    return found


def _json(name: str, *others: str) -> dict[str, Any]:
    """others: schemas that content may have instead."""
    schema = {"anyOf": [_ref(name), *map(_ref, others)]} if others else _ref(name)
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _requests(kind: type[GenerationRequest]) -> dict[str, Any]:
    """The schemas of a request body: supported fields, and unsupported ones with their neutral values."""
    found = answers.schemas((kind,))
    properties = found[kind.__name__]["properties"]
    for name, values in kind.neutral.items():
        properties[name] = {"anyOf": _neutral(values), "default": None}
    needs = {name: _only_with(name, other) for name, other in NEEDS.items() if name in properties}
    found[kind.__name__]["dependentSchemas"] = needs
    for name, schema in (("cache", CACHE), ("attention", ATTENTION)):
        properties[name] = {"anyOf": [schema, {"type": "null"}], "default": None}
    return found


def _token_requests() -> dict[str, Any]:
    """The schemas of /tokenize and /detokenize."""
    found = answers.schemas((TokenizeRequest, DetokenizeRequest, *answers.TOKENS))
    tokenize = found[TokenizeRequest.__name__]
    tokenize["properties"] |= {name: {"anyOf": _neutral(values), "default": None} for name, values in TOKENS.items()}
    given = {name: {"properties": {name: {"not": {"type": "null"}}}, "required": [name]} for name in ONE_OF}
    tokenize["oneOf"] = list(given.values())
    return found


def _add_parts(found: dict[str, Any], modalities: Collection[Modality]) -> None:
    """Adds to the schemas of requests what a message may hold beside text."""
    found |= answers.schemas(tuple(modality.body for modality in modalities))
    parts = [
        {
            "type": "object",
            "properties": {"type": {"type": "string", "const": each.kind}, each.kind: _ref(each.body.__name__)},
            "required": ["type", each.kind],
            "additionalProperties": False,
        }
        for each in modalities
    ]
    found[ChatMessage.__name__]["properties"]["content"] = content_schema(*parts)


def _only_with(name: str, other: str) -> dict[str, Any]:
    given = {"properties": {other: {"const": True}}, "required": [other]}
    return {"anyOf": [{"properties": {name: {"type": "null"}}}, given]}


def _neutral(values: Values) -> list[dict[str, Any]]:
    """Schemas that accept exactly these values, written so that client generators understand them."""
    found: list[dict[str, Any]] = []
    bools = [value for value in values if isinstance(value, bool)]
    if bools:
        found.append({"type": "boolean"} if len(bools) == 2 else {"type": "boolean", "const": bools[0]})
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        found.append({"type": "string", "enum": texts})
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    found += [{"type": "number", "minimum": value, "maximum": value} for value in numbers]
    for value in values:
        if isinstance(value, list):
            items = {"items": {"type": "string", "enum": value}} if value else {"items": {"type": "string"}}
            found.append({"type": "array", **items, "minItems": len(value), "maxItems": len(value)})
        elif isinstance(value, dict):
            fixed = {name: {"type": "string", "enum": [text]} for name, text in value.items()}
            closed = {"additionalProperties": False, "required": list(value)} if value else {"maxProperties": 0}
            found.append({"type": "object", **({"properties": fixed} if fixed else {}), **closed})
    return [*found, {"type": "null"}]


def _one_of(names: list[str]) -> dict[str, Any]:
    return {
        "type": "array",
        "maxItems": MAX_ITEMS,
        "items": {
            "type": "object",
            "properties": {name: {"type": "object", "additionalProperties": True} for name in names},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        },
    }


ATTENTION = {
    "type": "object",
    "description": "What is edited and read of attention. spans: names of parts of the prompt, texts or [start, stop)",
    "properties": {
        "edits": _one_of([name for name, kind in KINDS.items() if issubclass(kind, Edit)]),
        "read": _one_of([name for name, kind in KINDS.items() if issubclass(kind, Read)]),
        "spans": {
            "type": "object",
            "additionalProperties": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}]},
        },
    },
    "additionalProperties": False,
    "minProperties": 1,
}
CACHE = {
    "type": "object",
    "description": "How keys and values are kept: a policy and its options",
    "properties": {"policy": {"type": "string"}},
    "required": ["policy"],
    "additionalProperties": True,
}
