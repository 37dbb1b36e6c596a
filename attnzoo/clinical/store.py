"""Parsed files in the cache directory: arrays under a name that is a digest of what they were parsed from."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from attnzoo.files import write_atomic

Arrays = dict[str, np.ndarray]


def digest_of(paths: list[Path], salt: str) -> str:
    """A digest of the files' names and contents, and of `salt`, which names the parser and its version."""
    whole = hashlib.sha256(salt.encode())
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def cached(cache: Path | None, digest: Callable[[], str], parse: Callable[[], Arrays]) -> Arrays:
    """The arrays that `parse` makes, read from `cache` if they were parsed before; None: always parsed.

    Raises ValueError that names the file if it is damaged or cannot be written.
    """
    if cache is None:
        return parse()
    path = Path(cache) / "clinical" / f"{digest()[:16]}.safetensors"
    if path.is_file():
        return _read(path)
    arrays = parse()
    content = save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    try:
        write_atomic(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        raise ValueError(
            f"the parsed data cannot be written to {path} ({error.strerror or error}); make room there, or choose "
            "another cache directory"
        ) from None
    return arrays


def _read(path: Path) -> Arrays:
    """The file holds the SHA-256 of the safetensors that follow it."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("its content is not what was parsed")
        return load_arrays(content[32:])
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it: it is made anew") from None
