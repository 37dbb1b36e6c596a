"""`attnzoo exam`: a multiple-choice exam for any endpoint with OpenAI's interface."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from attnzoo import interrupts
from attnzoo.cli.outputs import OutputFile
from attnzoo.errors import complain, harmless
from attnzoo.files import user_path
from attnzoo.report import Report, counted

KEEP = "--answers FILE keeps what was answered"
EXAMPLES = """examples:
  attnzoo exam questions.csv --url http://127.0.0.1:8000/v1
  attnzoo exam questions.csv --url http://127.0.0.1:8000/v1 --rounds 5 --temperature 0.7 --answers answers.jsonl
  attnzoo exam questions.jsonl --url http://127.0.0.1:8000/v1 --mode letters --orders 4 --json exam.json

A question has a text, choices (an object from letters to texts, or a list) and an answer (a letter). Of an answer the
last letter that it marks counts; without one, with several at once, and where the answer did not end by itself (cut),
it is wrong, and counted as unread. A request that fails is counted apart, and asked again by the next run with the same
--answers. low and high: Wilson's interval of 95 %. orders_agree: questions that get the same option in every order of
their options. Exit status: 1 if a request failed as often as it was tried, and where no answer can be read; 2, without
a result, after wrong usage, for an endpoint that does not list its models, and for one that refuses a request or
answers without OpenAI's interface.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Give a model a multiple-choice exam over an endpoint with OpenAI's interface."
    parser.epilog = EXAMPLES
    parser.add_argument("questions", type=Path, help="a .csv or .jsonl file of questions")
    parser.add_argument("--url", required=True, help="of the endpoint, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="the model's name (default: the only one of the endpoint)")
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the endpoint's key")
    parser.add_argument(
        "--mode",
        choices=("chat", "letters"),
        default="chat",
        help="chat: ask for reasoning and read the letter; letters: take the likeliest next letter, for small models "
        "(default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="sampled answers that vote (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 for several rounds (default: 0)")
    parser.add_argument("--orders", type=int, default=1, metavar="N", help="orders of the options (default: 1)")
    parser.add_argument("--max-tokens", type=int, help="of an answer; chat only (default: 1024)")
    parser.add_argument(
        "--parallel", type=int, default=4, metavar="N", help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--group", default="domain", metavar="COLUMN", help="for results by group (default: %(default)s)"
    )
    parser.add_argument(
        "--answers", type=OutputFile, metavar="FILE", help="keep answers here (.jsonl), and go on from them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and orders (default: %(default)s)")
    parser.add_argument("--json", type=OutputFile, metavar="PATH", help="write the report to this file")


def run(options: argparse.Namespace) -> int:
    """Gives the exam and prints the results; returns the exit status. Raises ValueError."""
    interrupts.say("attnzoo exam: stopped before anything was asked")
    from scripts.exams.endpoint import Endpoint
    from scripts.exams.exam import Settings, fingerprint, rows, take, unread_answers
    from scripts.exams.journal import Journal
    from scripts.exams.questions import read_questions

    if options.mode == "letters" and options.max_tokens is not None:
        raise ValueError(f"--max-tokens={options.max_tokens} has no use with --mode letters, which takes one token")
    settings = Settings(
        mode=options.mode,
        rounds=options.rounds,
        temperature=options.temperature,
        tokens=1024 if options.max_tokens is None else options.max_tokens,
        orders=options.orders,
        seed=options.seed,
    )
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit={options.limit} must be at least 1")
    everything = read_questions(user_path(options.questions, "QUESTIONS"), options.group)
    questions = everything[: options.limit]
    for question in questions:  # before anything is asked
        question.reordered(settings.orders - 1, settings.seed)
    report = Report.start(command=options.command, seed=options.seed)
    with Endpoint(options.url, model=options.model, key=key_from(options.key_variable, "--key-variable")) as endpoint:
        kept = {"exam": fingerprint(everything), "model": endpoint.model, **asdict(settings)}
        with Journal(options.answers, kept) as journal:
            interrupts.say(f"attnzoo exam: {stopped(options.answers)}")
            failures = list[str]()
            answered = take(endpoint, questions, settings, journal, options.parallel, failures)
    interrupts.say("")
    report.rows += rows(answered, settings)
    report.print_table()
    if options.json:
        report.write(options.json)
    if failures:
        way = "the same command asks again" if options.answers else KEEP
        told = f"{counted(len(failures), 'request')} failed, the last one so: {failures[-1]}; {way}"
        print(harmless(told), file=sys.stderr)
    told, status = unread_answers(answered, settings.tokens, options.answers)
    if status:
        return complain("attnzoo exam", told, status)
    if told:
        print(told, file=sys.stderr)
    return 1 if any(each.failed for each in answered) else report.exit_status()


def stopped(answers: Path | None) -> str:
    """What Ctrl-C leaves, in words. answers: the file that keeps them."""
    again = "; the same command goes on from there" if answers else ""
    return f"stopped; {kept(answers)}{again}"


def kept(answers: Path | None) -> str:
    """Whether answers are kept, in words."""
    return f"'{answers}' keeps what was answered" if answers else f"nothing is kept: only {KEEP}"


def key_from(variable: str | None, option: str) -> str:
    """An endpoint's key from the environment; "" without a variable. Raises ValueError that names the option."""
    if variable is None:
        return ""
    if not os.environ.get(variable):
        raise ValueError(f"{option}: the environment has no {variable}")
    return os.environ[variable]
