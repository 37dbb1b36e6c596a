"""What `attnzoo generate` and `attnzoo chat` share: the model, the options of generation, and text on a terminal."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnzoo.settings import parse_words

if TYPE_CHECKING:
    from attnzoo.language_model import LanguageModel

OPTIONS = """options are key=value, as in Python (attnzoo.GenerationConfig): max_new_tokens, temperature (0: the most
likely token), top_p, top_k, seed, stop (a string or [several]), ignore_eos; cache=POLICY (d2o, think, snapkv,
streaming, ...) with the policy's own, such as keep_ratio=0.5. Values are YAML: stop="\\n\\n" is two line ends.
"""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that would drive a terminal instead of being read."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it computes."""
    parser.add_argument(
        "checkpoint", help="a directory of training (run or export) or of transformers, a .gguf file, or smollm2"
    )
    parser.add_argument("--dtype", default="auto", help="of the weights, for example bfloat16 (default: its own)")
    parser.add_argument(
        "--device", default="auto", help="for example cpu or cuda:1 (default: a GPU where there is one)"
    )


def load(options: argparse.Namespace) -> "LanguageModel":
    """The model and its tokenizer. Raises ValueError that names the option."""
    import attnzoo

    return attnzoo.load(options.checkpoint, dtype=options.dtype, device=options.device)


def generation_options(words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of `LanguageModel.generate`, from its `GenerationConfig` and cache alone. Raises ValueError for
    what is no key=value, and as `read_options`: before a model is read."""
    from attnzoo.generation import read_options

    chosen = parse_words(words, "max_new_tokens=64")
    read_options(None, chosen.get("cache"), {name: value for name, value in chosen.items() if name != "cache"})
    return chosen


def show(piece: str) -> None:
    """Writes text at once. A terminal gets no control character but line ends and tabs: models write what they like."""
    sys.stdout.write(CONTROLS.sub("\N{REPLACEMENT CHARACTER}", piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()
