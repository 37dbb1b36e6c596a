"""What the class of a plain module says: its options, what its forward takes, where it is from."""

import copy
import dataclasses
import inspect
import types
import typing
from functools import partial
from typing import Any

from torch import nn

from attnzoo.ops.common.masks import MaskField
from attnzoo.types import CheckedConfig, checked, type_name

NO_SOURCE = "no source given"

PLAIN = (bool, int, float, str, type(None), list, tuple, dict)
"""What a configuration file can hold."""


def options_of(item: type[nn.Module]) -> type:
    """A frozen configuration class with a field for each parameter of `__init__`, model_dim first.

    Raises ValueError that names the parameter for what is no option: without a type, of a type that no file holds,
    without a default (model_dim excepted), or with a default of another type; and for *args and **kwargs.
    """
    where = f"{item.__name__}.__init__"
    parameters = list(inspect.signature(item.__init__).parameters.values())[1:]
    try:
        hints = typing.get_type_hints(item.__init__)
    except NameError as error:
        raise ValueError(f"{where} has a parameter of an unknown type: {error}") from None
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{where} takes {parameter}: name each option, with a type and a default")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(f"{where}: {parameter.name} cannot be given by its name; leave the / out")
    if not parameters or parameters[0].name != "model_dim":
        found = parameters[0].name if parameters else "nothing"
        raise ValueError(f"{where} takes {found} first; it must be model_dim: int, the size of its input and output")
    if hints.get("model_dim") is not int:
        raise ValueError(f"{where}: model_dim must be annotated as int: model_dim: int")
    found_fields = [(p.name, hints.get(p.name), _field(p, hints.get(p.name), where)) for p in parameters]
    config = dataclasses.make_dataclass(
        f"{item.__name__}Config", found_fields, bases=(CheckedConfig,), frozen=True, kw_only=True
    )
    config.__module__, config.__doc__ = item.__module__, f"The options of {where}."
    return config


def _field(parameter: inspect.Parameter, hint: Any, where: str) -> Any:
    name, default = parameter.name, parameter.default
    if hint is None:
        raise ValueError(f"{where}: {name} has no type; write for example {name}: int = 4")
    if not is_plain(hint):
        raise ValueError(
            f"{where}: {name} is a {type_name(hint)}, which no configuration file holds; use bool, int, float, str, "
            "Literal, tuple, list or dict of these, or None"
        )
    if default is parameter.empty:
        if name == "model_dim":
            return dataclasses.field()
        raise ValueError(f"{where}: {name} has no default; give one, such as {name}: {type_name(hint)} = ...")
    checked(default, hint, f"{where}: {name}")
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=partial(copy.deepcopy, default))
    return dataclasses.field(default=default)


def is_plain(hint: Any) -> bool:
    """Whether values of a type stand in configuration files."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, tuple, dict):
        return all(argument is Ellipsis or is_plain(argument) for argument in arguments)
    return hint in PLAIN


def forward_takes(item: type[nn.Module]) -> frozenset[str]:
    """Which of context and mask forward takes beside x. Raises ValueError for a forward that cannot be called so."""
    name, forward = item.__name__, item.forward
    if forward is nn.Module.forward:
        raise ValueError(f"{name} has no forward(x)")
    found = frozenset(inspect.signature(forward).parameters) & {"context", "mask"}
    try:
        inspect.signature(forward).bind(None, None, **dict.fromkeys(found))
    except TypeError as error:
        raise ValueError(
            f"{name}.forward must take x of [batch, tokens, model_dim], and beside it only mask, context, and what has "
            f"a default ({error})"
        ) from None
    if found == {"context"}:
        raise ValueError(f"{name}.forward takes context without mask, which says what of it exists: add mask=None")
    return found


UNUSED = ("init_state", "extend", "init_context", "cost", "traits", "editing", "training_memory", "memory_by_hand")
"""What a variant has and a plain module does not: it is made here."""


def refuse_unused(item: type[nn.Module]) -> None:
    """Raises ValueError for a class that has written what would not be used."""
    for cls in item.__mro__:
        for name in UNUSED:
            if name in vars(cls) and not cls.__module__.startswith("torch."):  # nn.Sequential has an extend
                raise ValueError(
                    f"{item.__name__}.{name} would not be used: of a class with forward alone the streaming form and "
                    "the cost are made here. Make it a StreamingAttention (attnzoo.attention), which has them all, or "
                    "call it otherwise"
                )


def masks_of(item: type[nn.Module], takes: frozenset[str], causal: bool) -> frozenset[MaskField]:
    """What `Traits.masks` says. Raises ValueError for a field that there is not, or that does not fit."""
    if "mask" not in takes:
        return frozenset({"causal"} if causal else ())
    known: frozenset[MaskField] = (
        frozenset(typing.get_args(MaskField)) if causal else frozenset({"full", "keys", "pairs"})
    )
    said = frozenset(getattr(item, "masks", known))
    least = ({"causal"} if causal else {"full"}) | ({"full", "keys"} if "context" in takes else set())
    if not (least <= said <= known):
        raise ValueError(f"{item.__name__}.masks={sorted(said)} must hold {sorted(least)} and be of {sorted(known)}")
    return said


def source_of(item: type[nn.Module]) -> str:
    """The class's `source`, or what its docstring or its module's has behind "Source:"."""
    given = getattr(item, "source", None)
    if given is not None:
        return str(given)
    for text in (item.__doc__, getattr(inspect.getmodule(item), "__doc__", None)):
        for line in (text or "").splitlines():
            if line.strip().startswith("Source:"):
                return line.strip().removeprefix("Source:").strip()
    return NO_SOURCE
