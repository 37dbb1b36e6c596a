"""Reads JSON bodies more strictly than Python's json module.

Python accepts NaN, numbers of any size, unpaired surrogates, and names that occur twice. Each would cause an error
later, far from its field; here it is refused with the field's name.
"""

import json
import math
from typing import Any, NoReturn

from serve.openai.errors import ApiError, short_name

MAX_LEVELS = 32
"""Deepest nesting of lists and objects; a conversation needs six levels."""
MAX_NAMES = 256
"""Most names in one object; pydantic collects an error for every unknown name."""
LEAST, MOST = -(2**63), 2**63 - 1
"""Range of integers in a field."""


class _Number:
    """Stands for a number that is not allowed, until `_check` knows its field."""

    def __init__(self, text: str) -> None:
        self.text = text


def read_object(body: bytes, needed: str) -> dict[str, Any]:
    """The JSON object in a body. needed: required fields, for messages. Raises ApiError 400 that names the field."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_json(f"it is not UTF-8 at byte {error.start}") from None
    try:
        found = json.loads(
            text, object_pairs_hook=_once, parse_int=_integer, parse_float=_number, parse_constant=_Number
        )
    except json.JSONDecodeError as error:
        raise _no_json(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _too_deep("it") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object with the fields {needed}", code="invalid_json")
    if len(found) > MAX_NAMES:
        raise _too_many("the body", None)
    for name, value in found.items():
        _check(name, short_name(name))
        _check(value, short_name(name))
    return found


def _no_json(why: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {why}", code="invalid_json")


def _too_deep(name: str) -> ApiError:
    what = f"{name} has more than {MAX_LEVELS} levels of lists and objects; flatten it"
    return ApiError(400, what, param=None if name == "it" else name, code="invalid_json")


def _too_many(what: str, name: str | None) -> ApiError:
    return ApiError(400, f"{what} holds an object with more than {MAX_NAMES} names; send fewer", param=name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        shown = short_name(name)
        raise ApiError(400, f"{shown} is given twice in one object; give it once", param=shown, code="invalid_json")
    return found


def _integer(text: str) -> int | _Number:
    # int() raises beyond 4,300 digits; 64 bits need at most a sign and 19 digits.
    value = int(text) if len(text) <= 20 else None
    return value if value is not None and LEAST <= value <= MOST else _Number(text)


def _number(text: str) -> float | _Number:
    value = float(text)
    return value if math.isfinite(value) else _Number(text)


def _check(value: Any, name: str) -> None:
    """Raises ApiError that names the field `name` if its value has something that no field may have."""
    level = [value]
    for _ in range(MAX_LEVELS + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, name)
            elif isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                if len(item) > MAX_NAMES:
                    raise _too_many(name, name)
                below += item.keys()
                below += item.values()
            elif isinstance(item, _Number):
                _refuse(item, name)
        if not below:
            return
        level = below
    raise _too_deep(name)


def _check_text(text: str, name: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{name} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no text; remove it"
        raise ApiError(400, message, param=name, code="invalid_json") from None


def _refuse(number: _Number, name: str) -> NoReturn:
    shown = number.text if len(number.text) <= 24 else number.text[:24] + "..."
    if shown.lstrip("-") in ("NaN", "Infinity"):
        message = f"{name}: {shown} is no number in JSON; give a finite one"
    else:
        message = f"{name}: the number {shown} is too large; give one of 64 bits"
    raise ApiError(400, message, param=name)
