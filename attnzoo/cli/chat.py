"""`attnzoo chat`: a conversation in the terminal, or messages from stdin, one a line."""

import argparse
import contextlib
import re
import sys
from typing import TYPE_CHECKING, Any

from attnzoo.cli.text import OPTIONS, add_model_arguments, check_utf8, generation_options, load, show
from attnzoo.errors import complain

if TYPE_CHECKING:
    from attnzoo.language_model import LanguageModel

EXAMPLES = f"""examples:
  attnzoo chat smollm2
  attnzoo chat smollm2 --system "Answer in one sentence." temperature=0.7 top_p=0.95
  attnzoo chat smollm2 cache=d2o keep_ratio=0.5
  printf 'Name a prime number.\\nAnother one?\\n' | attnzoo chat smollm2

In the terminal: /reset starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer (the part that was
written stays in the conversation). {OPTIONS}"""
PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Talk to a model that has a chat template; answers are streamed."
    parser.epilog = EXAMPLES
    add_model_arguments(parser)
    parser.add_argument("options", nargs="*", metavar="key=value", help="generation and cache options")
    parser.add_argument("--system", metavar="TEXT", help="the system message, first in the conversation")


def run(options: argparse.Namespace) -> int:
    """Answers messages until the input ends; returns 1 if a file held a line that is no message.

    Raises ValueError for wrong usage, and, if stdin is not a terminal, for a message that cannot be answered.
    """
    chosen = generation_options(options.options)
    if chosen.get("logprobs") is not None:
        raise ValueError(f"logprobs={chosen['logprobs']}: a chat prints text alone; use attnzoo generate --json")
    lm = load(options)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    lm.stream_chat([*system, {"role": "user", "content": "x"}], **chosen)  # reports wrong options at once
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits and remembers lines
        print(f"{lm}\n/reset starts a new conversation, /exit leaves, Ctrl-C stops an answer", file=sys.stderr)
    messages, left_out = list(system), 0
    while (line := _read(terminal)) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(system)
        elif (why := _no_message(line)) is not None:
            complain("attnzoo chat", why)
            left_out += 1
        elif line:
            messages = _turn(lm, messages, line, chosen, terminal)
    return 1 if left_out and not terminal else 0


def _no_message(line: str) -> str | None:
    """Why a line is no message for the model."""
    if re.fullmatch(r"/[a-z]+", line):
        return f"unknown command {line}; known: /reset, /exit"
    try:
        check_utf8(line, "the line")
    except ValueError as error:
        return f"{error}; it is left out, and the conversation goes on"
    return None


def _read(terminal: bool) -> str | None:
    """The next line, stripped; None at the end of the input. Ctrl-C in a terminal gives an empty line."""
    try:
        return input(PROMPT if terminal else "").strip()
    except EOFError:
        if terminal:
            print()
        return None
    except KeyboardInterrupt:
        if not terminal:
            raise
        print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        return ""


def _turn(
    lm: "LanguageModel", messages: list[dict[str, str]], line: str, options: dict[str, Any], terminal: bool
) -> list[dict[str, str]]:
    """Answers one message. Returns the conversation with message and answer, or unchanged if answering failed."""
    asked = [*messages, {"role": "user", "content": line}]
    pieces: list[str] = []
    try:
        for piece in lm.stream_chat(asked, **options):
            pieces.append(piece)
            show(piece)
    except KeyboardInterrupt:
        if not terminal:
            raise
    except ValueError as error:
        if not terminal:
            raise
        complain("attnzoo chat", f"{error}; /reset starts a new conversation")
        return messages
    print(flush=True)
    return [*asked, {"role": "assistant", "content": "".join(pieces)}]
