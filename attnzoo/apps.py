"""Finds the directories train/, serve/, scripts/ and configs/.

In a checkout they stand beside attnzoo/. An installed package keeps them in attnzoo/_apps/, which is not on the import
path, so that they do not shadow other packages called `train` or `serve`. Only processes that the command `attnzoo`
starts import them by their short names.
"""

import os
import sys
from pathlib import Path

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
    if not is_installed():
        return
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != place]
    os.environ["PYTHONPATH"] = os.pathsep.join([place, *others])


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
