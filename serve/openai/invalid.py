"""What pydantic finds wrong in a request, as an error of the API that names the field."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serve.openai.errors import ApiError, short_name
from serve.openai.protocol import must, shown

Where = tuple[int | str, ...]
Body = TypeVar("Body", bound=BaseModel)


def validated(kind: type[Body], values: dict[str, Any], fields: Callable[[Where], list[str]]) -> Body:
    """The request of a kind. fields: names of the fields that the object at a place may have. Raises ApiError 400."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain_invalid(error, "", fields) from None


def explain_invalid(error: ValidationError, base: str, fields: Callable[[Where], list[str]]) -> ApiError:
    """The error for the first field that is wrong or unknown. base: the field that holds the object, "" for the body.
    fields: names of the fields that the object at a place may have."""
    found = error.errors(include_url=False, include_context=False)
    # A field that is missing is perhaps there under a wrong name.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    where = first["loc"]
    name = path(where, base)
    if first["type"] == "extra_forbidden":
        known = fields(where)
        near = get_close_matches(short_name(str(where[-1])), known, n=1, cutoff=0.5)
        way_out = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return ApiError(400, f"unknown field {name!r}; {way_out}", param=name, code="unsupported")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing", param=name)
    value = "" if isinstance(first["input"], list | dict) else f"={shown(first['input'])}"
    return ApiError(400, f"{name}{value} {must(first['msg'])}", param=name)


def path(where: Where, base: str = "") -> str:
    """A place in a request as its client writes it: patients[0].measurements[3].hour."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{short_name(part)}" for part in where]
    return "".join([base, *parts]).removeprefix(".")
