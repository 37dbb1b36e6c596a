"""Shape legend, dtypes, devices, and strict construction of configuration dataclasses.

Shape suffixes, used in every name that holds a tensor:

    B batch      T new tokens     S cached (context) tokens     V vocabulary
    D model dim  N query heads    K key/value heads             G = N / K query heads per kv head
    H head dim   P rows of a position table                     W width of a convolution
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from attnzoo.errors import suggest

C = TypeVar("C")
PLACE = -1
"""Stands among the token ids of a prompt where it has an embedding. No token has this id, so that whoever reads the ids
alone refuses the prompt, and the embedding is not lost silently."""

SCIENTIFIC = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}\Z")

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype for a name such as "bf16", or for itself. Raises ValueError that lists the known names."""
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}{suggest(str(name), DTYPES)}")
    return DTYPES[name]


def check_device(name: str | torch.device, *, empty: bool = False) -> None:
    """Raises ValueError if the device cannot compute. empty: allow "meta", whose tensors have shapes but no values."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            if empty:
                return
            raise ValueError(f"device={str(name)!r} has no memory; give cpu or cuda")
        torch.zeros(1, device=device).add(1).item()
    except TypeError:
        raise ValueError(f"device={name!r} has type {type(name).__name__}; give a name such as 'cpu'") from None
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={str(name)!r} cannot be used on this machine ({reason}); give cpu, or a GPU it has"
        ) from None


def dtype_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()


def floating(dtype: Any) -> torch.dtype:
    """The dtype. Raises ValueError unless it is one of floating-point numbers."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating-point torch.dtype, such as torch.float32")
    return dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over tokens: at least float32."""
    return torch.promote_types(dtype, torch.float32)


LARGEST = 2**31 - 1
"""Largest size, length or count in a layer's configuration; larger numbers would not fit into 32 bits."""


PLAIN = (bool, int, float, str, list, tuple, dict)
"""Kinds of defaults of fields."""


class CheckedConfig:
    """Base class of configuration dataclasses. It checks the type of every field at construction; integers must be at
    most LARGEST in size, and floating point numbers finite.

    Raises ValueError that names the field and the value; and, when the class is made, for a default without a type, of
    which `dataclass` would make no field.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        typed = inspect.get_annotations(cls)
        for name, value in vars(cls).items():
            if name not in typed and not name.startswith("_") and (value is None or isinstance(value, PLAIN)):
                kind = "int | None" if value is None else type(value).__name__
                raise ValueError(
                    f"{cls.__name__}.{name} = {value!r} has no type, so it is no option; write for example "
                    f"{name}: {kind} = {value!r}"
                )

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = checked(getattr(self, field.name), hints[field.name], field.name)
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"{field.name}={value} is out of range; it must be at most {LARGEST}")
            object.__setattr__(self, field.name, value)


def build_config(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Constructs the dataclass `cls` from a mapping.

    where: the section's name in error messages, for example "model.attention". For a float, an integer is accepted, and
    so is text such as "1e-6", which YAML 1.1 readers do not take for a number. Nothing else is converted: `"8"` for a
    number of heads is an error. Raises ValueError for an unknown key (naming the nearest known one), a missing key, or
    a value of the wrong type.
    """
    hints = field_types(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if not fields:
            raise ValueError(f"unknown key {where}.{key}; {where} has no options")
        if key not in fields:
            raise ValueError(f"unknown key {where}.{key}{suggest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}.{name} is missing: set it to a value of type {type_name(hints[name])}")
    return cls(**{key: checked(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by name. Raises ValueError for an annotation that names an unknown type."""
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise ValueError(f"{cls.__name__} has a field with an unknown type: {error}") from None


def checked(value: Any, hint: Any, where: str) -> Any:
    """The value, checked against the type `hint`. Where the type asks for them, integers become floats, and lists (JSON
    and YAML have no tuples) become tuples. Raises ValueError that names the field `where`."""
    # Literal[...] | None is a typing.Union, int | None a types.UnionType.
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    allowed = typing.get_args(hint) if union else (hint,)
    for kind in allowed:
        if kind is Any or (kind is type(None) and value is None):
            return value
        if kind is float and isinstance(value, str) and SCIENTIFIC.match(value):
            value = float(value)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(value, where)
        if kind is int and isinstance(value, bool):
            continue
        container = typing.get_origin(kind) or kind
        if container is typing.Literal:
            if value in typing.get_args(kind):
                return value
            raise ValueError(f"{where}={value!r} is not one of {', '.join(map(repr, typing.get_args(kind)))}")
        if container in (list, tuple) and isinstance(value, list | tuple):
            return _sequence(value, kind, where)
        if isinstance(container, type) and isinstance(value, container):
            return value
    names = " or ".join(map(type_name, allowed))
    raise ValueError(f"{where}={value!r} has type {type(value).__name__}; it must be {names}")


def type_name(hint: Any) -> str:
    """A type as people write it: int, not <class 'int'>."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _sequence(value: Sequence[Any], kind: Any, where: str) -> Any:
    """The sequence as the container (list or tuple) that the type `kind` asks for, every item checked."""
    container, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    if container is list or items[1:] == (...,):
        items = items[:1] * len(value)
    elif items and len(items) != len(value):
        raise ValueError(f"{where}={value!r} has {len(value)} items; it must be {kind}")
    hints = items or [Any] * len(value)
    return container(checked(item, hints[i], f"{where}[{i}]") for i, item in enumerate(value))


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}={number} must be a finite number")
    return number


def check_cost_sizes(batch: int, tokens: int, context: int, *, continues: bool = True) -> None:
    """Raises ValueError unless the sizes of a `cost` are whole numbers of at least 1. continues: the tokens are the
    last ones of the context, so that there cannot be more of them."""
    for name, value in (("batch", batch), ("tokens", tokens), ("context", context)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if continues and tokens > context:
        raise ValueError(f"tokens={tokens} is more than context={context}, which includes them")
