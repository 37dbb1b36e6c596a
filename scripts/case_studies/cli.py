"""`attnzoo case-study`: texts about people's days, written section by section over an endpoint, and judged."""

import argparse
from pathlib import Path

from attnzoo import interrupts
from attnzoo.cli.outputs import OutputFile

EXAMPLES = """examples:
  attnzoo case-study pmdata.tar.gz --url http://127.0.0.1:8000/v1 --stay "p03 2020-01-15"
  attnzoo case-study pmdata.tar.gz --url http://127.0.0.1:8000/v1 --kind fitness --count 10 --answers cases.jsonl
  attnzoo case-study pmdata.tar.gz --url http://127.0.0.1:8000/v1 --count 10 --rate likert --json cases.json

Each section is written with the sections before it in view: insights, etiology and recommendations of a sleep study;
training load, sleep, health metrics and assessment of a fitness study. --rate asks for every principle of the rubric;
a model that judges its own texts flatters them, so name another with --judge-url. Nothing here is medical advice.
A section that does not end by itself (at --max-tokens, by a filter, by a call) is marked as cut and not judged, and a
judge's answer that does not holds no rating. Exit status: 1 if a request failed or came back without a text, and where
nothing was rated; with --answers the next run, as one after Ctrl-C, asks only for what is missing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Write case studies about wearable data over an endpoint with OpenAI's interface."
    parser.epilog = EXAMPLES
    parser.add_argument("data", type=Path, help="PMData: a directory or an archive")
    parser.add_argument("--url", required=True, help="of the endpoint, for example http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="", help="the model's name (default: the only one of the endpoint)")
    parser.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the endpoint's key")
    parser.add_argument("--kind", choices=("sleep", "fitness"), default="sleep", help="(default: %(default)s)")
    parser.add_argument(
        "--stay", action="append", default=[], metavar="ID", help='a person and a day, "p03 2020-01-15"'
    )
    parser.add_argument("--count", type=int, metavar="N", help="draw N person-days with measurements (default: 1)")
    parser.add_argument("--days", type=int, default=15, metavar="N", help="days before the day (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the texts; a judge's is 0 (default: 0)")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, help="of a section, or of a judgement (default: %(default)s)"
    )
    parser.add_argument("--rate", choices=("likert", "yes_no"), help="judge the texts: 1 to 5, or yes or no")
    parser.add_argument("--judge-url", metavar="URL", help="endpoint of the judge (default: the writer's)")
    parser.add_argument("--judge-model", default="", metavar="NAME", help="name of the judge (default: its only model)")
    parser.add_argument("--judge-key-variable", metavar="NAME", help="environment variable of the judge's key")
    parser.add_argument(
        "--answers", type=OutputFile, metavar="FILE", help="keep answers here (.jsonl), and go on from them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples and of --count (default: %(default)s)")
    parser.add_argument("--json", type=OutputFile, metavar="PATH", help="write cases and ratings to this file")


def run(options: argparse.Namespace) -> int:
    """Writes the cases; returns the exit status. Raises ValueError."""
    interrupts.say("attnzoo case-study: stopped before anything was asked")
    from scripts.case_studies.cases import carry_out

    return carry_out(options)
