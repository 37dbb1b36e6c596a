"""`attnzoo card`: a model card, a data card and the items of TRIPOD+AI of a clinical run."""

import argparse
from pathlib import Path

from attnzoo.cli.outputs import OutputDirectory

EXAMPLES = """examples:
  attnzoo card runs/tscan-mortality
  attnzoo card runs/tscan-mortality --out cards --answers answers.yaml

Writes model-card.md, data-card.md and tripod-ai.md (the 27 items of TRIPOD+AI, each done, with the place, or not
applicable, with the reason, or not done). They say what the run's directory says and nothing else: what a run cannot
know, for example ethical approval, is not done until --answers has it. Such a file is YAML, item: text,
for example `17: approved by the board of our hospital`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = "Write a model card, a data card and the items of TRIPOD+AI of a clinical run."
    parser.epilog = EXAMPLES
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory of a clinical task")
    parser.add_argument("--out", type=OutputDirectory, metavar="DIR", help="where to write them (default: RUN/card)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="YAML with your answers to items, by number")


def run(options: argparse.Namespace) -> int:
    """Writes the three files, and prints their paths. Raises ValueError for wrong usage."""
    from attnzoo.clinical.card import NAMES, data_card, model_card
    from attnzoo.clinical.card_items import KNOWN, items_card
    from attnzoo.clinical.card_markdown import MARK
    from attnzoo.clinical.run_facts import damage, read_answers, read_run
    from attnzoo.files import output_directory, output_file, user_path, write_atomic

    facts = read_run(user_path(options.run, "RUN"))
    given = None
    if options.answers is not None:
        given = read_answers(user_path(options.answers, "--answers"), KNOWN)
    out = options.out if options.out is not None else output_directory(facts.directory / "card", "--out")
    with damage(facts.directory):
        texts = (model_card(facts), data_card(facts), items_card(facts, given, str(options.answers)))
    for name in NAMES:
        path = out / name
        if path.exists() and not (path.is_file() and path.read_bytes().startswith(MARK.encode())):
            raise ValueError(f"{path} was not written by attnzoo card, and would be lost; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:  # all of them or none
        output_file(out / name, "--out")
    for name, text in zip(NAMES, texts, strict=True):
        write_atomic(out / name, text.encode())
        print(out / name)
    return 0
