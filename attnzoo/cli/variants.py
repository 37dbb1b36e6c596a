"""The text that `attnzoo list` and `attnzoo describe` print about attention variants."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from attnzoo.apps import directory
from attnzoo.attention import ATTENTION, Attention, build_attention, slow_streaming, try_forward, variant
from attnzoo.attention.forward_only import ForwardOnly
from attnzoo.models.shapes import without_storage
from attnzoo.report import format_table
from attnzoo.types import parse_dtype, type_name


def check_context(context: int) -> None:
    """Raises ValueError for a context of fewer than 2 tokens, which cannot show how the state grows."""
    if context < 2:
        raise ValueError(f"--context={context} must be at least 2")


def state_growth(attention: Attention, context: int) -> tuple[int, int]:
    """(bytes that each token adds to the state of one sequence, constant bytes of the state)."""
    at, one_less = (attention.cost(1, 1, c).state_bytes for c in (context, context - 1))
    per_token = at - one_less
    return per_token, at - per_token * context


def configs_with(kind: str) -> list[str]:
    """Paths of the files under configs/ that use the variant, relative to the directory that holds configs/."""
    root = directory()
    paths = sorted((root / "configs").rglob("*.yaml"))
    read = {path: yaml.safe_load(path.read_text("utf-8")) for path in paths}
    return [path.relative_to(root).as_posix() for path, values in read.items() if kind in set(_attention_kinds(values))]


def _attention_kinds(values: Any) -> Iterator[str]:
    """The variants that a configuration's keys `attention` name."""
    if isinstance(values, list):
        for each in values:
            yield from _attention_kinds(each)
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _attention_kinds(value)
            if key == "attention":
                for each in value if isinstance(value, list) else [value]:
                    yield str(each.get("kind") if isinstance(each, dict) else each)


def list_variants(model_dim: int, context: int) -> tuple[str, list[str]]:
    """(table of the variants, one error line for each variant that cannot be built). Raises ValueError if none can."""
    rows, broken, first = [], [], None
    for kind in ATTENTION:
        try:
            rows.append(_row(kind, model_dim, context))
        except Exception as error:  # a plug-in may raise anything; the other variants are still listed
            first = first or error
            broken.append(f"{kind} ({_file(ATTENTION.get(kind))}) cannot be built: {type(error).__name__}: {error}")
    if not rows:  # a cause outside the variants, for example a wrong model_dim
        raise ValueError(str(first)) from first
    sizes = f"one layer, model_dim {model_dim}, default options, float32, one sequence"
    return f"{format_table(rows)}\n\n{sizes}; see also `attnzoo describe <variant>`", broken


def _row(kind: str, model_dim: int, context: int) -> dict[str, Any]:
    cls = ATTENTION.get(kind)
    with without_storage():
        attention = build_attention(kind, {"model_dim": model_dim})
    per_token, constant = state_growth(attention, context)
    return {
        "variant": kind,
        "position": attention.traits.position,
        "state": attention.traits.growth,
        "parameters": attention.cost(1, 1, 1).parameters,
        "state bytes/token": per_token,
        "constant bytes": constant,
        "what it is": (cls.__doc__ or "").strip().partition("\n")[0],
        "source": cls.source,
    }


def _said(trait: Any) -> str:
    """A trait's value; sets in an order of their own would differ from run to run."""
    return ",".join(sorted(trait)) or "none" if isinstance(trait, frozenset) else str(trait)


def _file(cls: type) -> str:
    return Path(inspect.getfile(cls)).name


def _text(cls: type[Attention]) -> str:
    """What is written about a variant: at the head of its file, or in the class of a plain module or of one of several
    variants in a file."""
    neighbours = [kind for kind in ATTENTION if ATTENTION.get(kind).__module__ == cls.__module__]
    plain = issubclass(cls, ForwardOnly)
    own = getattr(cls, "written", cls).__doc__
    head = sys.modules[cls.__module__].__doc__
    return inspect.cleandoc((own or head if plain or len(neighbours) > 1 else head or own) or "")


def describe(kind: str, options: dict[str, Any], context: int, dtype: str) -> str:
    """The description of one variant. Raises ValueError for an unknown variant, wrong options, or a plug-in's error."""
    cls = variant(kind)
    try:
        with without_storage():
            attention = build_attention(kind, options, kind).to(parse_dtype(dtype))
        try_forward(attention)
        traits = "  ".join(f"{key}={_said(value)}" for key, value in dataclasses.asdict(attention.traits).items())
        per_token, constant = state_growth(attention, context)
        prefill, decode = attention.cost(1, context, context), attention.cost(1, 1, context)
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # a plug-in may raise anything
        raise ValueError(f"{kind} ({_file(cls)}) cannot be described: {type(error).__name__}: {error}") from error
    fields = [
        f"  {field.name}: {type_name(field.type)} = {getattr(attention.config, field.name)!r}"
        for field in dataclasses.fields(cls.Config)
    ]
    parameters = [f"  {name} {list(parameter.shape)}" for name, parameter in attention.named_parameters()]
    text = _text(cls)
    return "\n".join(
        [
            f"{kind}: {text}\n",
            *([] if re.search(r"^Source:", text, re.MULTILINE) else [f"source: {cls.source}"]),
            f"file: {_file(cls)}",
            f"traits: {traits}",
            "options:",
            *fields,
            f"parameters: {prefill.parameters:,}",
            *parameters,
            f"state of one sequence, {dtype}: {per_token:,} bytes a token and {constant:,} bytes constant; "
            f"{decode.state_bytes:,} bytes at {context:,} tokens",
            f"FLOPs: {prefill.flops:,} for {context:,} tokens at once, {decode.flops:,} for the next token",
            f"configs: {', '.join(configs_with(kind)) or 'none under configs/'}",
            *([] if (slow := slow_streaming(kind)) is None else [f"\n{slow}"]),
        ]
    )
