"""The command `attnzoo`: its table of commands, and how one of them is found and run.

A command is a module with `add_arguments(parser)` and `run(options) -> exit status`, and the table names it. What
stands outside the library (train/, serve/, scripts/) is imported by its name when it is asked for. Modules are light:
help, the list of commands and wrong usage are answered without torch, and what computes is imported by `run`.
"""

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import attnzoo
from attnzoo import apps
from attnzoo.errors import complain, suggest
from attnzoo.report import run_command

PROGRAM = "attnzoo"
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
EXAMPLES = """examples:
  attnzoo list
  attnzoo describe rcmha
  attnzoo generate smollm2 "The capital of France is" cache=d2o keep_ratio=0.5
  attnzoo chat smollm2
  attnzoo train --config rcmha.yaml train.steps=200
  attnzoo serve --checkpoint runs/rcmha
  attnzoo COMMAND --help

python -m attnzoo is the same command. Exit status 2 is wrong usage, 130 Ctrl-C.
"""


@dataclass(frozen=True)
class Command:
    """module: has `run`, and `add_arguments` unless `arguments` ("module:function") is in its place, because importing
    `module` loads torch. extra: what `pip install 'attnzoo[extra]'` brings that it needs."""

    module: str
    help: str
    extra: str = ""
    arguments: str = ""


BENCHMARKS = {
    name: Command(f"scripts.bench_{name}", text, extra, f"scripts.arguments:bench_{name}")
    for name, text, extra in (
        ("attention", "time and memory of the variants, against torch's attention", ""),
        ("cache", "what compressed caches still find, at equal bytes", "train"),
        ("generate", "prefill and decoding of a real model, against other engines", "serve"),
        ("serve", "what Ray Serve and HTTP add to the plain engine", "serve"),
        ("train", "the DeepSpeed engine against a bare loop", "train"),
    )
}
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "list": Command("attnzoo.cli.list_variants", "the attention variants, one line each"),
    "describe": Command("attnzoo.cli.describe", "source, formula, options, parameters and cost of a variant"),
    "generate": Command("attnzoo.cli.generate", "continue a text"),
    "chat": Command("attnzoo.cli.chat", "talk to a model in the terminal"),
    "train": Command("attnzoo.cli.train", "train a language model with DeepSpeed", "train"),
    "serve": Command("serve.__main__", "serve a checkpoint over an OpenAI-compatible API", "serve"),
    "plan": Command("attnzoo.cli.plan", "what fits on so many GPUs, and how fast it can be"),
    "export": Command("attnzoo.cli.export", "a checkpoint as a directory of transformers"),
    "compare": Command(
        "scripts.compare.cli", "train variants side by side and measure them", "", "scripts.arguments:compare"
    ),
    "eval": Command(
        "scripts.eval_lm", "a checkpoint on tasks of the harness lm-eval", "eval", "scripts.arguments:evaluate"
    ),
    "reproduce": Command(
        "scripts.reproduce", "published experiments anew, every claim checked", "", "scripts.arguments:reproduce"
    ),
    "bench": BENCHMARKS,
    "completion": Command("attnzoo.cli.completion", "completion for bash or zsh"),
}


class CommandParser(argparse.ArgumentParser):
    """Examples are printed as they are written, and every mistake is one line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **options)

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """An argument that may be left out (nargs "*") is never told as one that is required."""
        if options.get("nargs") == "*":
            options.setdefault("default", [])
        return super().add_argument(*names, **options)

    def error(self, message: str) -> Any:
        raise SystemExit(complain(self.prog, f"{message}; {self.prog} --help says more"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. Raises SystemExit after help, and for arguments that do not parse."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, table = PROGRAM, COMMANDS
    while words and words[0] in table:
        name, command, words = f"{name} {words[0]}", table[words[0]], words[1:]
        if isinstance(command, Command):
            return _dispatch(name, command, words)
        table = dict(command)
    if words and not words[0].startswith("-"):
        return complain(name, f"unknown command {words[0]!r}{suggest(words[0], table)}")
    _overview(name, table).parse_args(words)
    return complain(name, f"name a command; known: {', '.join(table)}; {name} --help says more")


def carry_out(
    name: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    words: Sequence[str],
) -> int:
    """Parses, runs, and says what went wrong; returns the exit status. `name`: how the user calls it. `run` finds the
    whole command in options.command, for reports."""
    parser = CommandParser(prog=name)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    options.command = [*name.split(), *words]
    try:
        return run(options)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        return complain(name, str(error))


def entry() -> int:
    """What the installed command calls: `main`, quiet where Ctrl-C or the end of a pipe stops it."""
    prepare_streams()
    try:
        return run_command(main)
    except KeyboardInterrupt:
        return INTERRUPTED


def prepare_streams() -> None:
    """Standard streams that were closed lead nowhere, so that no file gets their place; what stdout cannot encode is
    written as "?"; a warning about an old name is one line."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    usual = warnings.formatwarning

    def say(message: Any, category: type[Warning], *rest: Any) -> str:
        if issubclass(category, FutureWarning):
            return f"{PROGRAM}: warning: {message}\n"
        return usual(message, category, *rest)

    warnings.formatwarning = say  # type: ignore[assignment]  # the last argument may be left out


def command_tree() -> CommandParser:
    """One parser of all commands with their arguments, for completion and for documents."""
    parser = _overview(PROGRAM, {})
    _grow(parser, COMMANDS)
    return parser


def _grow(parser: CommandParser, table: Mapping[str, Command | dict[str, Command]]) -> None:
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, command in table.items():
        if isinstance(command, dict):
            _grow(commands.add_parser(name, help=_help(command)), command)
        else:
            arguments_of(command)(commands.add_parser(name, help=command.help))


def _dispatch(name: str, command: Command, words: Sequence[str]) -> int:
    def run(options: argparse.Namespace) -> int:
        return int(importlib.import_module(command.module).run(options))

    try:
        return carry_out(name, arguments_of(command), run, words)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("attnzoo", "train", "serve", "scripts"):
            raise
        what = f"attnzoo[{command.extra}]" if command.extra else "attnzoo"
        return complain(name, f"the package {error.name} is not installed; pip install '{what}'")


def arguments_of(command: Command) -> Callable[[argparse.ArgumentParser], None]:
    """The function that adds the command's arguments to a parser."""
    apps.use()
    module, _, function = (command.arguments or f"{command.module}:add_arguments").partition(":")
    found: Callable[[argparse.ArgumentParser], None] = getattr(importlib.import_module(module), function)
    return found


def _overview(name: str, table: Mapping[str, Command | dict[str, Command]]) -> CommandParser:
    """The parser for help, --version and what is no command."""
    lines = [f"  {each:12}{_help(command)}" for each, command in table.items()]
    parser = CommandParser(
        prog=name,
        usage=f"{name} COMMAND ...",
        description="\n".join(["commands:", *lines]),
        epilog=EXAMPLES if name == PROGRAM else f"{name} NAME --help says what a command measures and takes.",
    )
    if name == PROGRAM:
        parser.add_argument("--version", action="version", version=f"{PROGRAM} {attnzoo.__version__}")
    return parser


def _help(command: Command | dict[str, Command]) -> str:
    return command.help if isinstance(command, Command) else f"measure: {', '.join(command)}"
