"""Where the programs around the library are: the directories train/, serve/, scripts/ and configs/.

In a checkout they stand beside attnzoo/. An installed package keeps them inside attnzoo/_apps/, off the import path, so
that packages of other projects that are called `train` or `serve` are not shadowed; only the processes that the command
`attnzoo` starts import them by their short names.
"""

import os
import sys
from pathlib import Path

from attnzoo.files import home

PACKAGE = Path(__file__).resolve().parent


def directory() -> Path:
    """The directory that holds train/, serve/, scripts/ and configs/."""
    return PACKAGE / "_apps" if is_installed() else PACKAGE.parent


def is_installed() -> bool:
    """Whether this is a built package, not a checkout."""
    return (PACKAGE / "_apps").is_dir()


def use() -> None:
    """Lets this process import `train`, `serve` and `scripts`, first on its path. What it starts finds them too:
    those of a checkout as it found attnzoo itself, those of an installed package by PYTHONPATH."""
    place = str(directory())
    sys.path[:] = [place, *(entry for entry in sys.path if entry != place)]
    if not is_installed():
        return
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != place]
    os.environ["PYTHONPATH"] = os.pathsep.join([place, *others])


def find_config(name: str | os.PathLike[str]) -> Path:
    """The configuration file that a name means: a bare name is looked up in configs/ first, and `configs/NAME` means
    the file that ships where the current directory has none. A name that leads nowhere stays the path it is."""
    path, configs = Path(name), directory() / "configs"
    if path.parent == Path(".") and (configs / path).is_file():
        return configs / path
    if not path.exists() and path.parts[:1] == ("configs",) and (directory() / path).is_file():
        return directory() / path
    return path


def cache_directory() -> Path:
    """Where prepared data, tokenizers, compiled extensions and tokens of servers are kept; it need not exist.

    $ATTNZOO_HOME where it is set; .cache of a checkout that may be written to; else the user's cache directory.
    """
    root = directory()
    if os.environ.get("ATTNZOO_HOME") or is_installed() or not os.access(root, os.W_OK):
        return home()
    return root / ".cache"
