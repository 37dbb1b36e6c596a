"""`attnzoo export`: writes a checkpoint as a directory that transformers reads."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  attnzoo export runs/mha out
  attnzoo export runs/rcmha out --format attnzoo
  attnzoo export model.gguf out
  attnzoo export smollm2 out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Write a checkpoint as a directory that transformers reads."
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", help="a directory that training or transformers has written, a .gguf file, or smollm2"
    )
    parser.add_argument("out", type=Path, help="directory to write; an earlier export in it is replaced")
    parser.add_argument(
        "--format",
        choices=["auto", "native", "attnzoo"],
        default="auto",
        help="native: as Llama, Mistral, Qwen2 or Qwen3, which load without attnzoo; attnzoo: any model; loading it "
        "needs `import attnzoo.hf`; auto: native if the model has such a form (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Exports, and prints what was written. Raises ValueError for wrong usage."""
    from attnzoo import export

    return export.run(options)
