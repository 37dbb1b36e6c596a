"""Every program in examples/ runs, and prints what the text at its head says, up to numbers and the model's words."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT
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
def test_an_example_prints_what_it_says(path):
    if path.stem == "smaller_cache":
        smollm2()  # skips where its package is not there
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) + "\n"
    assert f"python examples/{path.name}" in head
    command = [sys.executable, str(path)]
    if path.stem == "openai_client":
        with running(max_num_seqs=4) as (url, _):
            printed = run([*command, url])
    else:
        printed = run(command)
    expected = outline(promised(head))
    assert outline(printed)[-len(expected) :] == expected


def run(command):
    kept = {name: value for name, value in os.environ.items() if name != "ATTNZOO_PLUGINS"}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
