"""`attnzoo generate`: continues a text and streams it to stdout."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from attnzoo.cli.text import OPTIONS, add_model_arguments, check_prompt, check_utf8, generation_options, load, show

if TYPE_CHECKING:
    from attnzoo.generation import Generation

LENGTH = 128
"""Default of max_new_tokens."""
EXAMPLES = f"""examples:
  attnzoo generate smollm2 "The capital of France is"
  attnzoo generate runs/demo "def " max_new_tokens=64 temperature=0.8 seed=1
  attnzoo generate smollm2 "$(cat report.txt)" cache=d2o keep_ratio=0.5
  attnzoo generate smollm2 - --json < prompt.txt

{OPTIONS}max_new_tokens defaults to {LENGTH}, or less if the context is shorter; n=3 writes three texts.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Continue a text and stream the continuation to stdout."
    parser.epilog = EXAMPLES
    add_model_arguments(parser)
    parser.add_argument("prompt", help="the text to continue; - reads it from stdin")
    parser.add_argument("options", nargs="*", metavar="key=value", help="generation and cache options")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: texts, token ids, log probabilities, cache"
    )


def run(options: argparse.Namespace) -> int:
    """Generates and prints. Raises ValueError for wrong usage."""
    check_prompt(options.prompt)
    chosen = generation_options(options.options)
    if chosen.get("logprobs") is not None and not options.json:
        raise ValueError(f"logprobs={chosen['logprobs']} is printed as JSON only; add --json")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt:
        source = "stdin is empty, and the prompt was to be read from it" if options.prompt else "the prompt is empty"
        raise ValueError(f"{source}; give at least one character")
    check_utf8(prompt, "stdin" if options.prompt == "-" else "the prompt")
    lm = load(options)
    if "max_new_tokens" not in chosen:
        chosen["max_new_tokens"] = max(1, min(LENGTH, lm.config.max_positions - len(lm.encode(prompt))))
    if options.json:
        print(json.dumps(_plain(lm.generate(prompt, **chosen))))
    elif chosen.get("n", 1) == 1:
        for piece in lm.stream(prompt, **chosen):
            show(piece)
        print()
    else:
        for number, each in enumerate(lm.generate(prompt, **chosen).outputs, 1):
            show(f"[{number}]\n{each.text}\n")
    return 0


def _plain(generation: "Generation") -> dict[str, Any]:
    return dataclasses.asdict(generation)
