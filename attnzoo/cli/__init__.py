"""The command `attnzoo`: its table of commands, and the function that runs one.

A command is a module with `add_arguments(parser)` and `run(options) -> exit status`, named in `COMMANDS`. Commands
outside the library (in train/, serve/, scripts/) are imported by name when they are used. Importing a command's module
does not import torch, so that help and errors come at once; `run` imports what computes.
"""

import argparse
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import attnzoo
from attnzoo import apps
from attnzoo.cli.outputs import check_outputs
from attnzoo.errors import ChangedSourceWarning, OutputError, complain, suggest
from attnzoo.interrupts import INTERRUPTED, tell
from attnzoo.report import run_command

PROGRAM = "attnzoo"
EXAMPLES = """examples:
  attnzoo list
  attnzoo describe rcmha
  attnzoo generate smollm2 "The capital of France is" cache=d2o keep_ratio=0.5
  attnzoo chat smollm2
  attnzoo attention smollm2 "The cat sat on the mat because it was tired."
  attnzoo train --config rcmha.yaml train.steps=200
  attnzoo serve --checkpoint runs/rcmha
  attnzoo COMMAND --help

python -m attnzoo is the same command. Exit status: 2 after wrong usage, 130 after Ctrl-C.
"""


@dataclass(frozen=True)
class Command:
    """module: the module with `run` and `add_arguments`. arguments: "module:function" that replaces `add_arguments`
    where importing `module` would import torch. extra: the extra that it needs (`pip install 'attnzoo[extra]'`)."""

    module: str
    help: str
    extra: str = ""
    arguments: str = ""


BENCHMARKS = {
    name: Command(f"scripts.bench_{name}", text, extra, f"scripts.arguments:bench_{name}")
    for name, text, extra in (
        ("attention", "time and memory of the variants, against torch's attention", ""),
        ("cache", "retrieval from compressed KV caches of equal size", "train"),
        ("edits", "cost of reads and edits of attention, against a hook in transformers", "hf"),
        ("generate", "prefill and decoding speed of a real model, against other engines", "serve"),
        ("serve", "overhead of Ray Serve and HTTP over the plain engine", "serve"),
        ("train", "training speed under DeepSpeed, against a plain PyTorch loop", "train"),
    )
}
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "list": Command("attnzoo.cli.list_variants", "list the attention variants"),
    "describe": Command("attnzoo.cli.describe", "show source, formula, options, parameters and cost of a variant"),
    "generate": Command("attnzoo.cli.generate", "continue a text"),
    "chat": Command("attnzoo.cli.chat", "talk to a model in the terminal"),
    "attention": Command("attnzoo.cli.attention", "write a page that shows the attention of every layer and head"),
    "train": Command("attnzoo.cli.train", "train a language model with DeepSpeed", "train"),
    "serve": Command("serve.__main__", "serve a checkpoint over an OpenAI-compatible API", "serve"),
    "plan": Command("attnzoo.cli.plan", "estimate memory and speed of a model on a number of GPUs"),
    "export": Command("attnzoo.cli.export", "write a checkpoint as a directory that transformers reads"),
    "compare": Command(
        "scripts.compare.cli", "train variants side by side and measure them", "", "scripts.arguments:compare"
    ),
    "eval": Command(
        "scripts.eval_lm", "evaluate a checkpoint on tasks of lm-eval", "eval", "scripts.arguments:evaluate"
    ),
    "card": Command(
        "attnzoo.cli.card", "write the model card, data card and TRIPOD+AI items of a clinical run", "clinical"
    ),
    "exam": Command("scripts.exams.cli", "give a served model a multiple-choice exam", "clinical"),
    "case-study": Command("scripts.case_studies.cli", "write and judge texts about wearable data", "clinical"),
    "reproduce": Command(
        "scripts.reproduce", "repeat published experiments and check their claims", "", "scripts.arguments:reproduce"
    ),
    "bench": BENCHMARKS,
    "completion": Command("attnzoo.cli.completion", "print a completion script for bash or zsh"),
}


INVALID_CHOICE = re.compile(r"argument (?P<name>\S+): invalid choice: '(?P<value>.*)' \(choose from (?P<known>.*)\)")
"""How argparse says that a value is none of the known ones."""
INVALID_NUMBER = re.compile(r"argument (?P<name>[^:]+): invalid (?P<kind>int|float) value: (?P<value>.*)")
"""How argparse says that a value is no number."""
REQUIRED = re.compile(r"the following arguments are required: (?P<name>--\S+)")
UNRECOGNIZED = re.compile(r"unrecognized arguments: (?P<name>--?[a-zA-Z][\w-]*)(=(?P<value>\S+))?")
TEXTS = ("prompt", "text")
"""Arguments that are read from stdin for the word -."""
WORD = "key=value"
"""The metavar of options that are written so."""


class Once(argparse._StoreAction):
    """Stores an option's value. A second value is an error: one of the two would be lost without a word."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        if isinstance(parser, CommandParser) and self.option_strings:
            if self.dest in parser.given:
                raise argparse.ArgumentError(self, "is given twice; keep one of them")
            parser.given.add(self.dest)
        super().__call__(parser, namespace, *rest)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that prints the epilog unchanged and reports every mistake in one line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **options)
        self.register("action", None, Once)
        self.register("action", "store", Once)
        self._words: list[str] = []
        self._takes_words = False
        self.given: set[str] = set()

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Adds an argument; one with nargs "*" gets a default, so that messages do not list it as required."""
        if options.get("nargs") == "*":
            options.setdefault("default", [])
        return super().add_argument(*names, **options)

    def error(self, message: str) -> Any:
        choice = INVALID_CHOICE.fullmatch(message)
        if choice is not None:
            known = re.findall(r"'([^']*)'", choice["known"]) or choice["known"].split(", ")
            message = f"{choice['name']}: no such choice {choice['value']!r}{suggest(choice['value'], known)}"
        number = INVALID_NUMBER.fullmatch(message)
        if number is not None:
            right = "a whole number, for example 8" if number["kind"] == "int" else "a number, for example 0.5"
            message = f"{number['name']}={number['value']} must be {right}"
        hint = self._way_out(message)
        end = " see" if hint.endswith("?") else "; see"
        raise SystemExit(complain(self.prog, f"{message}{hint}{end} {self.prog} --help"))

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """As argparse does. An empty path would be the working directory."""
        if action.type is Path and not text:
            raise argparse.ArgumentError(action, "is empty; give a path")
        return super()._get_value(action, text)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Prints help; argparse would keep silent about a stdout that cannot be written."""
        if message:
            (file or sys.stderr).write(message)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; messages may then name the words."""
        self._words = list(args or [])
        self._takes_words = any(not action.option_strings and action.nargs is None for action in self._actions)
        self.given.clear()
        return super().parse_intermixed_args(args, namespace)

    def _way_out(self, message: str) -> str:
        """What to write in place of an option that is missing, or that there is not."""
        missing = REQUIRED.fullmatch(message)
        word = self._words[0] if self._words and not self._takes_words else ""
        if missing is not None and word and not word.startswith("-") and "=" not in word:
            return f": write {missing['name']} {word}"
        found = UNRECOGNIZED.match(message)
        if found is None:
            return ""
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        near = get_close_matches(found["name"], options, n=1, cutoff=0.7)
        if near:
            return f"; did you mean {near[0]}?"
        if not found["name"].startswith("--") and any(action.dest in TEXTS for action in self._actions):
            return "; a text that begins with - is read from stdin: write - in its place"
        if all(action.metavar != WORD for action in self._actions):
            return ""
        value = found["value"] or self._after(found["name"])
        return f"; write {found['name'].strip('-').replace('-', '_')}={value}"

    def _after(self, name: str) -> str:
        """The word after an option; "..." if there is none."""
        words = [*self._words, "...", "..."]
        return words[words.index(name) + 1] if name in self._words else "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status. Raises SystemExit after --help, and for wrong arguments."""
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
    return complain(name, f"name a command; known: {', '.join(table)}; see {name} --help")


def carry_out(
    name: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    words: Sequence[str],
) -> int:
    """Parses `words`, calls `run`, prints its error in one line, and returns the exit status.

    name: the command as the user types it. `run` finds the whole command line in options.command, for reports. What
    the command is to write is checked before `run` is called."""
    parser = CommandParser(prog=name)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    options.command = [*name.split(), *words]
    try:
        check_outputs(options)
        return run(options)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError | OutputError):
            raise
        return complain(name, str(error))


def entry() -> int:
    """Runs `main` for the entry point (`attnzoo.__main__`), and ends without a traceback on Ctrl-C or a closed pipe."""
    prepare_streams()
    try:
        return run_command(main)
    except KeyboardInterrupt:
        tell()
        return INTERRUPTED


def prepare_streams() -> None:
    """Prepares the standard streams: closed ones are opened on /dev/null, so that no other file gets their descriptors;
    stdout writes "?" for what it cannot encode; warnings for users are one line."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    usual = warnings.formatwarning

    def say(message: Any, category: type[Warning], *rest: Any) -> str:
        if issubclass(category, FutureWarning | ChangedSourceWarning):
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
        return complain(name, f"the package {error.name} is not installed; run pip install '{what}'")


def arguments_of(command: Command) -> Callable[[argparse.ArgumentParser], None]:
    """The function that adds the command's arguments to a parser."""
    apps.use()
    module, _, function = (command.arguments or f"{command.module}:add_arguments").partition(":")
    found: Callable[[argparse.ArgumentParser], None] = getattr(importlib.import_module(module), function)
    return found


def _overview(name: str, table: Mapping[str, Command | dict[str, Command]]) -> CommandParser:
    """The parser for --help, --version and everything else that is not a command."""
    lines = [f"  {each:12}{_help(command)}" for each, command in table.items()]
    parser = CommandParser(
        prog=name,
        usage=f"{name} COMMAND ...",
        description="\n".join(["commands:", *lines]),
        epilog=EXAMPLES if name == PROGRAM else f"{name} NAME --help describes one benchmark.",
    )
    if name == PROGRAM:
        parser.add_argument("--version", action="version", version=f"{PROGRAM} {attnzoo.__version__}")
    return parser


def _help(command: Command | dict[str, Command]) -> str:
    return command.help if isinstance(command, Command) else f"measure: {', '.join(command)}"
