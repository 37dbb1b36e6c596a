"""Every command and every piece of Python in the documents: checked or run, or marked with the reason why not."""

import pytest
import yaml

from attnzoo.attention import ATTENTION
from tests.docs.blocks import PAGES, ROOT, blocks, commands
from tests.docs.commands import check
from tests.docs.walk import environment, new_names, prepare, run_python, shell, walk

BLOCKS = {page: blocks(page) for page in PAGES}


def pages_with(language, *modes):
    return [page for page in PAGES if any(b.language == language and b.mode in modes for b in BLOCKS[page])]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages_with("sh", "", "run", "slow", "never"), ids=name)
def test_commands_name_what_there_is(page):
    for block in BLOCKS[page]:
        for line in commands(block) if block.language == "sh" else ():
            try:
                check(line)
            except ValueError as error:
                pytest.fail(f"{block.where}: {error}")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("attnzoo lst", "known are"),
        ("attnzoo plan --modle x", "--modle is no option"),
        ("make tset", "no such target"),
        ("make serve MODEL=smollm3", "no such model"),
        ("python train/main.py --config rcmha.yaml train.stps=3", "train.stps"),
        ("python -m serve --checkpoint x max_num_seq=4", "max_num_seq"),
        ("serve run serve.deployment:ap checkpoint=x", "there is no serve.deployment:ap"),
        ("pip install 'attnzoo[hff]'", "no extra hff"),
        ('curl http://127.0.0.1:8000/v1/completions -d \'{"promt": "a"}\'', "has no promt"),
        ("cp attnzoo/attention/_templat.py mine.py", "there is no attnzoo/attention/_templat.py"),
        ("conda install x", "nothing here checks"),
    ],
)
def test_wrong_commands_are_found(line, problem):
    with pytest.raises(ValueError, match=problem):
        check(line)


@pytest.mark.parametrize("page", pages_with("python", ""), ids=name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, variants = new_names(), set(ATTENTION)
    try:
        for block in BLOCKS[page]:
            if block.language == "python" and block.mode == "":
                run_python(block, names)
    finally:
        for variant in set(ATTENTION) - variants:  # other tests go over all that there are
            ATTENTION.remove(variant)


@pytest.mark.parametrize("page", pages_with("sh", "run"), ids=name)
def test_quick_commands_run(page, tmp_path):
    prepare(tmp_path)
    known = environment(tmp_path)
    for block in BLOCKS[page]:
        if block.language == "sh" and block.mode == "run":
            known = shell(block, tmp_path, known)


def test_yaml_is_yaml():
    for block in (b for each in BLOCKS.values() for b in each if b.language == "yaml"):
        assert yaml.safe_load(block.code), block.where


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", sorted({*pages_with("sh", "slow"), *pages_with("python", "slow")}), ids=name)
def test_a_reader_gets_through_the_page(page, tmp_path):
    walk(page, tmp_path)
