"""`attnzoo describe`: shows one attention variant and its cost."""

import argparse

from attnzoo.cli.list_variants import add_sizes

EXAMPLES = """examples:
  attnzoo describe rcmha
  attnzoo describe mha num_heads=8 num_kv_heads=2 --model-dim 512 --context 4096 --dtype bf16
  ATTNZOO_PLUGINS=my_variant.py attnzoo describe mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Show source, formula, traits, options, parameters, cost and configs of one variant."
    parser.epilog = EXAMPLES
    parser.add_argument("variant", help="a name that `attnzoo list` shows")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the variant")
    parser.add_argument("--dtype", default="float32", help="of weights and state (default: %(default)s)")
    add_sizes(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the description. Raises ValueError for wrong usage."""
    from attnzoo.cli.variants import check_context, describe
    from attnzoo.settings import parse_words

    check_context(options.context)
    chosen = {"model_dim": options.model_dim} | parse_words(options.options, "num_heads=8")
    print(describe(options.variant, chosen, options.context, options.dtype))
    return 0
