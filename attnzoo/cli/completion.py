"""`attnzoo completion`: what a shell needs to complete commands, options and files."""

import argparse

EXAMPLES = """examples:
  eval "$(attnzoo completion bash)"                                       # this shell; a line for ~/.bashrc
  attnzoo completion zsh > ~/.zfunc/_attnzoo                              # a directory of zsh's fpath

needs the package shtab: pip install shtab
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Print a completion script for a shell."
    parser.epilog = EXAMPLES
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(options: argparse.Namespace) -> int:
    """Prints the script. Raises ValueError where shtab is missing."""
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs the package shtab: pip install shtab") from None
    from attnzoo.cli import command_tree

    print(shtab.complete(command_tree(), options.shell))
    return 0
