"""Every program in examples/ runs, and prints what the text at its head says, up to numbers and the model's words."""

import ast
import os
import re

import pytest

from tests.docs.blocks import ROOT
from tests.helpers.forked import start_script
from tests.helpers.gguf_files import smollm2
from tests.helpers.http_server import running

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
VARYING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d[\d.,]*(?:e[-+]?\d+)?")
"""Numbers and quoted texts, which differ between processors."""


def outline(lines):
    return [" ".join(VARYING.sub("#", line).split()) for line in lines]


def promised(text):
    """The last block of lines that the text at the head of a program shows after "prints" or "ends with"."""
    shown = re.split(r"\b(?:prints|ends with)\b", text)[1]
    return re.search(r"\n\n((?:    .*\n)+)", shown)[1].splitlines()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path, tmp_path):
    if path.stem == "smaller_cache":
        smollm2()  # skips where its package is not there
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) + "\n"
    assert f"python examples/{path.name}" in head
    if path.stem == "openai_client":
        with running(max_num_seqs=4) as (url, _):
            printed = run([str(path), url], tmp_path)
    else:
        printed = run([str(path)], tmp_path)
    expected = outline(promised(head))
    assert outline(printed)[-len(expected) :] == expected


def run(words, directory):
    kept = {name: value for name, value in os.environ.items() if name != "ATTNZOO_PLUGINS"}
    out, errors = directory / "out", directory / "errors"
    process = start_script(words, kept, out, errors, cwd=ROOT)
    process.join(300)
    assert process.exitcode == 0, errors.read_text()
    return out.read_text().splitlines()
