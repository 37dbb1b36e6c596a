"""Finds the directories train/, serve/, scripts/ and configs/.

In a checkout they stand beside attnzoo/. An installed package keeps them in attnzoo/_apps/, which is not on the import
path, so that they do not shadow other packages called `train` or `serve`. Only processes that the command `attnzoo`
starts import them by their short names.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnzoo.files import home, user_path

PACKAGE = Path(__file__).resolve().parent


def directory() -> Path:
    """The directory that holds train/, serve/, scripts/ and configs/."""
    return PACKAGE / "_apps" if is_installed() else PACKAGE.parent


def is_installed() -> bool:
    """Whether attnzoo runs from an installed package, not from a checkout."""
    return (PACKAGE / "_apps").is_dir()


def use() -> None:
    """Puts `train`, `serve` and `scripts` first on the import path of this process. Child processes find them too: in a
    checkout beside attnzoo itself, in an installed package through PYTHONPATH, which this function sets."""
    place = str(directory())
    sys.path[:] = [place, *(entry for entry in sys.path if entry != place)]
    os.environ.update(variables())


def variables() -> dict[str, str]:
    """The environment variables by which a Python process finds `train`, `serve` and `scripts` of an installed package;
    none in a checkout."""
    if not is_installed():
        return {}
    place = str(directory())
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != place]
    return {"PYTHONPATH": os.pathsep.join([place, *others])}


def server(args: Mapping[str, Any]) -> Any:
    """The application for Ray's own command, wherever attnzoo is installed: `serve run attnzoo.apps:server
    checkpoint=runs/demo max_num_seqs=8`. Arguments and errors are those of `serve.deployment.app`.

    Raises ValueError where the current directory has a `serve` of its own: Ray puts it first on its workers' path.
    """
    use()
    hides = next((name for name in ("serve.py", "serve") if os.path.exists(name)), None)
    if hides is not None and Path.cwd() != directory():
        raise ValueError(
            f"{str(Path.cwd() / hides)!r} hides the server's code from Ray's workers; start in another directory, or "
            "use attnzoo serve"
        )
    return importlib.import_module("serve.deployment").app(args)


def proxy() -> Any:
    """Middlewares of Ray's HTTP proxy: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=attnzoo.apps:proxy; see
    `serve.front.proxy`."""
    use()
    return importlib.import_module("serve.front.proxy").middlewares()


def __getattr__(name: str) -> Any:
    """The attribute `application`, for `serve build attnzoo.apps:application`; see `serve.deployment`."""
    if name != "application":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    use()
    return importlib.import_module("serve.deployment").application


def find_config(name: str | os.PathLike[str], where: str = "--config") -> Path:
    """The path of a configuration file. A bare name is looked up in configs/ first. `configs/NAME` means the file that
    ships with attnzoo unless the current directory has one. A name that is not found is returned as it is.

    Raises ValueError, naming `where`, as `user_path`.
    """
    path, configs = user_path(os.fspath(name), where), directory() / "configs"
    if path.parent == Path(".") and (configs / path).is_file():
        return configs / path
    if not path.exists() and path.parts[:1] == ("configs",) and (directory() / path).is_file():
        return directory() / path
    return path


def cache_directory() -> Path:
    """The directory of prepared data, tokenizers, compiled extensions and servers' access tokens; it may not exist yet.

    It is $ATTNZOO_HOME if that is set, else .cache in a writable checkout, else the user's cache directory.
    """
    root = directory()
    if os.environ.get("ATTNZOO_HOME") or is_installed() or not os.access(root, os.W_OK):
        return home()
    return root / ".cache"
