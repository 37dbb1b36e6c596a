"""`python -m attnzoo list`, `describe <variant>`, `plan` and `export`: what there is, what it costs, what fits, and
models for transformers."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from attnzoo.attention import ATTENTION, PLUGINS_VARIABLE, Attention, build_attention, variant
from attnzoo.files import unique_keys
from attnzoo.models.shapes import without_storage
from attnzoo.report import format_table, run_command
from attnzoo.types import parse_dtype

EXAMPLES = f"""examples:
  python -m attnzoo list
  python -m attnzoo describe rcmha
  python -m attnzoo compare --quick
  python -m attnzoo describe mha num_heads=8 num_kv_heads=2 --model-dim 512 --context 4096 --dtype bf16
  python -m attnzoo plan --model configs/rcmha.yaml --gpus 64 --gpu-memory 80 --context 131072
  python -m attnzoo export runs/mha/export out
  {PLUGINS_VARIABLE}=my_variant.py python -m attnzoo list
"""
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def state_growth(attention: Attention, context: int) -> tuple[int, int]:
    """(bytes each further token adds to the state of one sequence, bytes it takes before the first)."""
    at, one_less = (attention.cost(1, 1, c).state_bytes for c in (context, context - 1))
    per_token = at - one_less
    return per_token, at - per_token * context


def configs_with(kind: str) -> list[str]:
    """Names of the configs under configs/ that name the variant."""
    pattern = re.compile(rf"(kind|attention):\s*(\[[^\]]*)?\b{re.escape(kind)}\b")
    paths = sorted(CONFIGS.rglob("*.yaml")) if CONFIGS.is_dir() else []
    return [str(path.relative_to(CONFIGS.parent)) for path in paths if pattern.search(path.read_text("utf-8"))]


def list_variants(model_dim: int, context: int) -> tuple[str, list[str]]:
    """(one line a variant, one line for each that cannot be built)."""
    rows, broken, first = [], [], None
    for kind in ATTENTION:
        try:
            rows.append(_row(kind, model_dim, context))
        except Exception as error:  # whatever a variant of somebody's own raises, the others are listed
            first = first or error
            broken.append(f"{kind} ({_file(ATTENTION.get(kind))}) cannot be built: {type(error).__name__}: {error}")
    if not rows:  # then it is not the variants that are at fault
        raise ValueError(str(first)) from first
    sizes = f"one layer, model_dim {model_dim}, default options, float32, one sequence"
    return f"{format_table(rows)}\n\n{sizes}; `python -m attnzoo describe <variant>` says more", broken


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


def _file(cls: type) -> str:
    return Path(inspect.getfile(cls)).name


def describe(kind: str, options: dict[str, Any], context: int, dtype: str) -> str:
    """Source, formula, traits, options, parameters, cost and configs of one variant."""
    cls = variant(kind)
    try:
        with without_storage():
            attention = build_attention(kind, options, kind).to(parse_dtype(dtype))
        traits = "  ".join(f"{key}={value}" for key, value in dataclasses.asdict(attention.traits).items())
        per_token, constant = state_growth(attention, context)
        prefill, decode = attention.cost(1, context, context), attention.cost(1, 1, context)
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a variant of somebody's own raises
        raise ValueError(f"{kind} ({_file(cls)}) cannot be described: {type(error).__name__}: {error}") from error
    fields = [
        f"  {field.name}: {_type_name(field.type)} = {getattr(attention.config, field.name)!r}"
        for field in dataclasses.fields(cls.Config)
    ]
    parameters = [f"  {name} {list(parameter.shape)}" for name, parameter in attention.named_parameters()]
    module = sys.modules[cls.__module__]
    return "\n".join(
        [
            f"{kind}: {inspect.cleandoc(module.__doc__ or cls.__doc__ or '')}",
            f"\nsource: {cls.source}",
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
        ]
    )


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`key=value` with JSON values; what is no JSON is a string. Raises ValueError for a word without "="."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"option {pair!r} is not of the form key=value, for example num_heads=8")
        try:
            options[key] = json.loads(text, object_pairs_hook=unique_keys)
        except json.JSONDecodeError:
            options[key] = text
        except (ValueError, RecursionError) as error:  # too many digits or levels, or a key twice
            raise ValueError(f"option {key!r} has a value that cannot be read ({error})") from None
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status, 2 for wrong usage."""
    from attnzoo import export
    from attnzoo.planner import plan

    parser = argparse.ArgumentParser(
        prog="python -m attnzoo",
        description="What attention variants there are, and what each is and costs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        compare: Callable[[list[str]], int] = import_module("scripts.compare.cli").main
        return compare(arguments[1:])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("compare", help="train variants side by side and measure them; see compare --help")
    listing = commands.add_parser("list", help="one line a variant")
    describing = commands.add_parser("describe", help="source, formula, traits, options, parameters, cost, configs")
    describing.add_argument("variant", help="a name that `list` shows")
    describing.add_argument("options", nargs="*", metavar="key=value", help="options of the variant")
    describing.add_argument("--dtype", default="float32", help="of weights and state (default: %(default)s)")
    for command in (listing, describing):
        command.add_argument("--model-dim", type=int, default=256, help="model dimension (default: %(default)s)")
        command.add_argument("--context", type=int, default=1024, help="tokens of context (default: %(default)s)")
    plan.add_arguments(commands.add_parser("plan", help="what fits on so many GPUs, and how fast it can be"))
    export.add_arguments(commands.add_parser("export", help="a checkpoint as a directory of transformers"))
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "plan":
            return plan.run(chosen)
        if chosen.command == "export":
            return export.run(chosen)
        if chosen.context < 2:
            raise ValueError(f"--context={chosen.context} must be at least 2")
        if chosen.command == "list":
            printed, broken = list_variants(chosen.model_dim, chosen.context)
            print(printed)
            for line in broken:
                print(f"attnzoo: {line}", file=sys.stderr)
            return 1 if broken else 0
        options = {"model_dim": chosen.model_dim} | parse_options(chosen.options)
        print(describe(chosen.variant, options, chosen.context, chosen.dtype))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"attnzoo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
