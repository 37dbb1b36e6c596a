"""`attnzoo list`: lists the attention variants, one a line."""

import argparse
import sys

EXAMPLES = """examples:
  attnzoo list
  attnzoo list --model-dim 512 --context 4096
  ATTNZOO_PLUGINS=my_variant.py attnzoo list

exit status: 1 when a variant cannot be built
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "List the attention variants with their state, parameters and source."
    parser.epilog = EXAMPLES
    add_sizes(parser)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the sizes at which costs are computed."""
    parser.add_argument("--model-dim", type=int, default=256, help="model dimension (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of context (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Prints the table; exit status 1 when a variant cannot be built. Raises ValueError for wrong usage."""
    from attnzoo.cli.variants import check_context, list_variants

    check_context(options.context)
    printed, broken = list_variants(options.model_dim, options.context)
    print(printed)
    for line in broken:
        print(f"attnzoo list: {line}", file=sys.stderr)
    return 1 if broken else 0
