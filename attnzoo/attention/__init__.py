"""Attention variants: one variant, one file. `base.py` is their contract, `parts` what they are made of.

Every module here whose name has no leading underscore is imported, so a new file is found at once. Files outside
the tree are named in the environment variable ATTNZOO_PLUGINS (paths separated by the system's path separator), and
imported when a variant is first asked for.
"""

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention.base import ATTENTION, Attention, Cost, StreamingAttention, Traits, streaming
from attnzoo.attention.forward_only import RecomputedAttention, as_variant, try_forward
from attnzoo.files import user_path
from attnzoo.types import build_config, check_device, parse_dtype

PLUGINS_VARIABLE = "ATTNZOO_PLUGINS"


def build_attention(kind: str, values: dict[str, object], where: str = "attention") -> Attention:
    """The variant registered as `kind`, configured by `values` (its Config's fields).

    Raises ValueError for an unknown variant, an unknown or missing field, or sizes that do not fit, for sizes that need
    more memory than there is, and for a variant that keeps a tensor which is neither parameter nor buffer.
    """
    cls = variant(kind)
    config: Any = build_config(cls.Config, values, where)
    try:
        built = cls(config)
    except (RuntimeError, MemoryError) as error:
        # torch has no kind of error for "can't allocate memory" on a CPU, nor for a product of sizes that overflows.
        if isinstance(error, MemoryError) or re.search("allocate|memory|storage size|overflow", str(error)):
            sizes = ", ".join(f"{key}={value!r}" for key, value in values.items())
            first = str(error).partition("\n")[0]
            raise ValueError(
                f"{where}: {kind!r} with {sizes} does not fit into memory; make it smaller ({first})"
            ) from None
        raise
    _check_tensors(built, f"{where}: {kind!r}")
    _check_unsaved(built, f"{where}: {kind!r}")
    return built


_OF_TORCH = frozenset(vars(nn.Module()))
"""Names of what a module keeps of its own, tensors by name among it."""


def _check_tensors(built: Attention, where: str) -> None:
    """Raises ValueError for a tensor that no checkpoint would hold and no device would be told of."""
    known = {id(x) for x in (*built.parameters(), *built.buffers())}
    for path, module in built.named_modules():
        for name in vars(module).keys() - _OF_TORCH:
            value = vars(module)[name]
            inside = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            )
            if any(isinstance(each, Tensor) and id(each) not in known for each in inside):
                full = ".".join(filter(None, (path.removeprefix("module").strip("."), name)))
                raise ValueError(
                    f"{where} keeps {full}, a tensor that is neither a parameter nor a buffer, which no checkpoint "
                    f"holds and no device is told of; write self.register_buffer({name!r}, ...), with persistent=False "
                    "where it follows from the options"
                )


def unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that `state_dict` leaves out, by name."""
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in saved}


_FOLLOW: set[tuple[type[Attention], str]] = set()
"""Variants with their options whose unsaved buffers are known to follow from the options."""


def _check_unsaved(built: Attention, where: str) -> None:
    """Raises ValueError for a buffer that no checkpoint would hold and that has other numbers in another layer of the
    same options, such as random ones: a model that is loaded would be another one."""
    unsaved = {name: x for name, x in unsaved_buffers(built).items() if x.numel() and not x.is_meta}
    key = type(built), repr(built.config)
    if not unsaved or key in _FOLLOW:
        return
    with torch.random.fork_rng(devices=[]):
        again = unsaved_buffers(type(built)(built.config))
    for name, x in unsaved.items():
        if not _same(x, again[name]):
            name = name.removeprefix("module.")
            raise ValueError(
                f"{where} keeps the buffer {name} with persistent=False, which no checkpoint holds, and its numbers "
                "are others in every layer that is built: a loaded model would be another one. Leave persistent=False "
                "out, or draw them from a generator with a seed of its own"
            )
    _FOLLOW.add(key)


def _same(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and not bool(((x != other) & ((x == x) | (other == other))).any())  # NaN as NaN


def variant(kind: str) -> type[Attention]:
    """The class registered as `kind`. Raises ValueError that lists the known names, and says where others come from."""
    loaded = ATTENTION.names()  # what a plug-in of the user's raises is said as it is
    try:
        return ATTENTION.get(kind)
    except ValueError as error:
        assert kind not in loaded
        given = os.environ.get(PLUGINS_VARIABLE)
        read = f"{PLUGINS_VARIABLE}={given!r} was read" if given else f"{PLUGINS_VARIABLE} is not set"
        raise ValueError(
            f"{error}. A variant in a file of yours: name the file in {PLUGINS_VARIABLE} ({read})"
        ) from None


def is_plugin(kind: str) -> bool:
    """Whether the variant registered as `kind` comes from a file of the user's."""
    return not variant(kind).__module__.startswith(f"{__name__}.")


def slow_streaming(kind: str) -> str | None:
    """What whoever streams with a variant is told if it recomputes, and what makes it fast; None for all others."""
    if not issubclass(variant(kind), RecomputedAttention):
        return None
    return (
        f"{kind} streams by recomputation, which is slow: its forward runs over all tokens so far for every new one. "
        "To make it fast, build it from parts, or write init_state and extend (CONTRIBUTING.md, 'From a forward to "
        "kernels')"
    )


def attention(
    name: str,
    /,
    *,
    model_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Attention:
    """A layer of the variant `name` (`attnzoo.variants()` lists them) with random weights, an nn.Module.

    >>> layer = attnzoo.attention("rcmha", model_dim=256, num_heads=8)    # doctest: +SKIP
    >>> layer(torch.randn(2, 100, 256)).shape                             # doctest: +SKIP
    torch.Size([2, 100, 256])

    model_dim: size D of its input and output, x_BTD to y_BTD of [batch, tokens, D]. device, dtype: of its weights, by
    default torch's own. Other options are the variant's, and have defaults (`attnzoo describe rcmha` shows
    them). The layer also streams: `init_state(batch, capacity)`, then `extend(chunk, state)` of any chunk length; and
    says what it takes: `cost(batch, tokens, context)`.

    Raises ValueError for an unknown name or option, with the nearest known one, for sizes that do not fit each other,
    for an unknown dtype, and for a device that cannot be used.
    """
    kind = None if dtype is None else parse_dtype(dtype)
    if device is not None:
        check_device(device, empty=True)
    return build_attention(name, {"model_dim": model_dim, **options}, name).to(device=device, dtype=kind)


def load_plugins(paths: str) -> None:
    """Imports each file of a path list; each registers its variants.

    Raises ValueError, naming the variable and the file, for a path that is not a Python file, a file that fails to
    import, and one that registers nothing; its message is one line and the place in the file.
    """
    for entry in filter(None, (part.strip() for part in paths.split(os.pathsep))):
        where = f"{PLUGINS_VARIABLE}={paths!r}: {entry!r}"
        path = user_path(entry, PLUGINS_VARIABLE).resolve()
        if not path.is_file() or path.suffix != ".py":
            raise ValueError(f"{where} {_not_a_file(entry, path)}; give paths of .py files separated by {os.pathsep!r}")
        _import_plugin(path, where)


def _not_a_file(entry: str, path: Path) -> str:
    if path.is_dir():
        return "is a directory"
    others = [separator for separator in ",;: " if separator != os.pathsep and f".py{separator}" in entry]
    if others:
        return f"is not a Python file: is {others[0]!r} meant to separate two paths?"
    if path.exists():
        return "is not a Python file"
    start = (
        "" if Path(entry).expanduser().is_absolute() else f" (read from {Path.cwd()}; a whole path holds everywhere)"
    )
    return f"is not a Python file: nothing is there{start}"


def _import_plugin(path: Path, where: str) -> None:
    # Two files of one name in two directories are two modules.
    name = f"attnzoo_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = ATTENTION.names()
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that exits would end the command without a word
        del sys.modules[name]
        for added in set(ATTENTION.names()) - set(before):
            ATTENTION.remove(added)
        raise ValueError(f"{where} cannot be imported: {_what_and_where(error, path)}") from error
    if ATTENTION.names() == before:
        raise ValueError(f'{where} registers no variant; put @ATTENTION.register("name") before your class')


def _what_and_where(error: BaseException, path: Path) -> str:
    """The error in one line, with the last line of the file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {said}{'' if line is None else f' (line {line})'}"


class _Callable(ModuleType):
    """The package itself: `attnzoo.attention("rcmha", ...)` builds a layer, and `import attnzoo.attention` binds the
    package to the same name."""

    __call__ = staticmethod(attention)


sys.modules[__name__].__class__ = _Callable

ATTENTION.adapt_by(as_variant)
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
ATTENTION.load_first(lambda: load_plugins(os.environ.get(PLUGINS_VARIABLE, "")))

__all__ = [
    "ATTENTION",
    "PLUGINS_VARIABLE",
    "Attention",
    "Cost",
    "StreamingAttention",
    "Traits",
    "attention",
    "build_attention",
    "is_plugin",
    "load_plugins",
    "slow_streaming",
    "streaming",
    "try_forward",
    "variant",
]
