"""Results of parts of an experiment in files, so that an interrupted one goes on where it was."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.files import write_atomic

Arrays = dict[str, np.ndarray]


def kept(directory: Path, name: str, key: Mapping[str, Any], make: Callable[[], Arrays]) -> tuple[Arrays, bool]:
    """(what `make` returns, whether it was there already): from the file of this name and key, which is written first
    if it is not there. key: all that the result depends on. Raises ValueError for a damaged file."""
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:12]
    path = directory / f"{name.replace(', ', '-').replace(' ', '-')}-{digest}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as found:
                return dict(found), True
        except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it to compute it again") from None
    content, arrays = io.BytesIO(), make()
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(content, **named)
    write_atomic(path, content.getvalue())
    return arrays, False
