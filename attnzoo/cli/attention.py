"""`attnzoo attention`: writes a page that shows the attention of every layer and head for a text."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.cli.outputs import OutputFile
from attnzoo.cli.text import add_model_arguments, check_text, load
from attnzoo.errors import suggest
from attnzoo.files import output_file, write_atomic
from attnzoo.settings import parse_words

if TYPE_CHECKING:
    from attnzoo.attention_page import Selection

EXAMPLES = """examples:
  attnzoo attention smollm2 "The cat sat on the mat because it was tired."
  attnzoo attention runs/demo "def step" layers=0:2 heads=[0,3] --out maps.html
  attnzoo attention smollm2 - max_tokens=400 layers=-1 --out maps.html --replace < report.txt

Options are written key=value: layers and heads (a number, 4:8 for 4 to 7, a list of these such as [0,2,-1], or all;
default: all), and max_tokens, the most tokens that the text may have (default: 256, at most 2048). The page is one file
that opens without a network; its size grows with layers, heads and the square of the tokens.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = (
        "Write an HTML page that shows the attention weights of a text: a picture of every layer and head, the weights "
        "on hover, and the text coloured by them."
    )
    parser.epilog = EXAMPLES
    add_model_arguments(parser)
    parser.add_argument("text", help="the text to read; - reads it from stdin")
    parser.add_argument("options", nargs="*", metavar="key=value", help="layers, heads, max_tokens")
    parser.add_argument(
        "--out",
        type=OutputFile,
        default="attention.html",
        metavar="PATH",
        help="the file to write (default: %(default)s)",
    )
    parser.add_argument("--replace", action="store_true", help="replace the file if it is there")


def run(options: argparse.Namespace) -> int:
    """Writes the page and says what is in it. Raises ValueError for wrong usage."""
    from attnzoo.attention_page import Selection, check_maps, page, read_maps
    from attnzoo.report import counted

    check_text("text", options.text, [field.name for field in dataclasses.fields(Selection)])
    selection, out = _selection(options.options), options.out
    text = sys.stdin.read() if options.text == "-" else options.text
    lm = load(options)
    check_maps(lm, text, selection)
    _check_free(out, options.replace)
    maps = read_maps(lm, text, selection)
    content = page(maps).encode()
    _check_free(out, options.replace)
    write_atomic(out, content)
    heads = sum(len(each.heads) for each in maps.layers)
    parts = (counted(len(maps.layers), "layer"), counted(heads, "head"), counted(len(maps.tokens), "token"))
    print(f"{options.out}: {', '.join(parts)}, {len(content) / 1e6:,.1f} MB; open it in a browser")
    for note in maps.notes:
        print(note)
    return 0


def _selection(words: list[str]) -> "Selection":
    """What `key=value` words choose. Raises ValueError for an unknown key or a bad value."""
    from attnzoo.attention_page import Selection

    chosen = parse_words(words, "layers=0:4")
    known = [field.name for field in dataclasses.fields(Selection)]
    for name in chosen:
        if name not in known:
            raise ValueError(f"unknown option {name!r}{suggest(name, known)}")
    return Selection(**chosen)


def _check_free(out: Path, replace: bool) -> None:
    """Raises ValueError unless a file may be written there now."""
    output_file(out, "--out")
    if os.path.lexists(out) and not replace:
        raise ValueError(f"--out={str(out)!r} is there already; give another path, or --replace to replace it")
