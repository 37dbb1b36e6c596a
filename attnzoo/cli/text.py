"""Shared by `attnzoo generate` and `attnzoo chat`: loading the model, generation options, output to a terminal."""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from attnzoo.settings import parse_words

if TYPE_CHECKING:
    from attnzoo.language_model import LanguageModel

OPTIONS = """Options are written key=value and named as in attnzoo.GenerationConfig: max_new_tokens, temperature (0:
greedy), top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed, stop (a string
or [a, list]), ignore_eos; cache=POLICY (d2o, think, snapkv, streaming, ...) and the policy's options, such as
keep_ratio=0.5. Values are YAML: stop="\\n\\n" is two newlines.
"""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters that a terminal would interpret."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for the model, its dtype and its device."""
    parser.add_argument(
        "checkpoint", help="a directory that training or transformers has written, a .gguf file, or smollm2"
    )
    parser.add_argument("--dtype", default="auto", help="of the weights, for example bfloat16 (default: checkpoint's)")
    parser.add_argument("--device", default="auto", help="for example cpu or cuda:1 (default: a GPU if there is one)")


def load(options: argparse.Namespace) -> "LanguageModel":
    """The model and its tokenizer. Raises ValueError that names the option."""
    import attnzoo

    if sys.stderr.isatty():
        print(f"loading {options.checkpoint} ...", file=sys.stderr)
    return attnzoo.load(options.checkpoint, dtype=options.dtype, device=options.device)


def generation_options(words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for `LanguageModel.generate` from `key=value` words, checked before a model is loaded. Raises
    ValueError for a malformed word, and the errors of `read_options`."""
    from attnzoo.generation import read_options

    chosen = parse_words(words, "max_new_tokens=64")
    read_options(None, chosen.get("cache"), {name: value for name, value in chosen.items() if name != "cache"})
    return chosen


def check_prompt(word: str) -> None:
    """Raises ValueError where the prompt was forgotten, so that the first option stands in its place."""
    from attnzoo.kvcache import CACHES
    from attnzoo.kvcache.choice import option_names
    from attnzoo.models.generation_config import FIELDS

    check_text("prompt", word, {"cache", *FIELDS, *(name for policy in CACHES for name in option_names(policy))})


def check_text(what: str, word: str, options: Collection[str]) -> None:
    """Raises ValueError where `word`, which should be a text, gives one of the options. what: the text's name."""
    if "=" in word and word.partition("=")[0] in options:
        raise ValueError(
            f"the {what} is missing: {word!r} is an option; write it after the text, or - and the text on stdin"
        )


def check_utf8(text: str, where: str) -> None:
    """Raises ValueError for text that was read from bytes that are no UTF-8. where: what was read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ValueError(
            f"{where} is not UTF-8: byte 0x{byte:02X} at character {error.start + 1}; convert it, for example with "
            "iconv -t UTF-8"
        ) from None


def show(piece: str) -> None:
    """Writes text and flushes. On a terminal, control characters other than newline and tab are replaced."""
    sys.stdout.write(CONTROLS.sub("\N{REPLACEMENT CHARACTER}", piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()
