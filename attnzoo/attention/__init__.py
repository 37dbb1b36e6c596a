"""Attention variants: one variant, one file. `base.py` is their contract, `parts` what they are made of.

Every module here whose name has no leading underscore is imported, so a new file is found at once. Files outside
the tree are named in the environment variable ATTNZOO_PLUGINS (paths separated by the system's path separator).
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path

from attnzoo.attention.base import ATTENTION, Attention, Cost, Traits
from attnzoo.types import build_config

PLUGINS_VARIABLE = "ATTNZOO_PLUGINS"


def build_attention(kind: str, values: dict[str, object], where: str = "attention") -> Attention:
    """The variant registered as `kind`, configured by `values` (its Config's fields).

    Raises ValueError for an unknown variant, an unknown or missing field, or sizes that do not fit.
    """
    cls = ATTENTION.get(kind)
    return cls(build_config(cls.Config, values, where))


def load_plugins(paths: str) -> None:
    """Imports each file of a path list; each registers its variants.

    Raises ValueError for a path that is not a Python file.
    """
    for entry in filter(None, paths.split(os.pathsep)):
        path = Path(entry).expanduser().resolve()
        name = f"attnzoo_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise ValueError(
                f"{PLUGINS_VARIABLE}={paths!r}: {entry!r} is not a Python file; give paths of .py files "
                f"separated by {os.pathsep!r}"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
load_plugins(os.environ.get(PLUGINS_VARIABLE, ""))

__all__ = ["ATTENTION", "PLUGINS_VARIABLE", "Attention", "Cost", "Traits", "build_attention", "load_plugins"]
