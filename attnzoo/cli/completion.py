"""`attnzoo completion`: prints the script with which a shell completes commands, options and files."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from attnzoo.cli.outputs import OutputDirectory, OutputFile

FILES = ("checkpoint", "config")
"""Arguments that take a path or a name; completion offers paths."""
EXAMPLES = """examples:
  eval "$(attnzoo completion bash)"                    # for this shell; put the line into ~/.bashrc for every shell
  attnzoo completion zsh > ~/.zfunc/_attnzoo           # any directory of zsh's fpath

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Print a completion script for a shell."
    parser.epilog = EXAMPLES
    parser.add_argument("shell", choices=["bash", "zsh"])


def run(options: argparse.Namespace) -> int:
    """Prints the script."""
    import shtab

    from attnzoo.cli import command_tree

    tree = command_tree()
    for action in _actions(tree):
        if action.type in (Path, OutputFile, OutputDirectory) or action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    print(shtab.complete(tree, options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of the commands below it."""
    for action in parser._actions:  # argparse has no public way to ask
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
