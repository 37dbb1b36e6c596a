"""What CONTRIBUTING promises a newcomer: copy the template, and the contract finds it, in the tree or outside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import attnzoo.attention
from attnzoo.attention import ATTENTION
from tests.contract.contract import ITEMS

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(attnzoo.attention.__file__).parent / "_template.py"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def contract_run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("-q", "-p", "no:cacheprovider", "-k", "mine and test_contract")
    return run("-m", "pytest", "tests/contract", *options, *arguments, cwd=cwd, **environment)


def test_plugin_outside_the_tree(tmp_path):
    plugin = tmp_path / "my_variant.py"
    shutil.copyfile(TEMPLATE, plugin)
    result = contract_run(cwd=ROOT, ATTNZOO_PLUGINS=str(plugin))
    assert result.returncode == 0, result.stdout
    assert f"{len(ITEMS)} passed" in result.stdout
    listed = run("-m", "attnzoo", "list", cwd=ROOT, ATTNZOO_PLUGINS=str(plugin))
    assert "\nmine " in listed.stdout


def test_copy_of_the_template_in_the_tree(tmp_path):
    tree = tmp_path / "tree"
    for folder in ("attnzoo", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tree / "pyproject.toml")
    shutil.copyfile(TEMPLATE, tree / "attnzoo" / "attention" / "mine.py")
    result = contract_run(cwd=tree, PYTHONPATH=str(tree))
    assert result.returncode == 0, result.stdout
    assert f"{len(ITEMS)} passed" in result.stdout


def test_broken_plugin_is_caught(tmp_path):
    """A plugin whose streaming form forgets its distance fails the contract."""
    text = TEMPLATE.read_text(encoding="utf-8")
    broken = text.replace("mask=mask", "mask=shifted(mask)")
    assert broken != text
    broken += (
        "\n\ndef shifted(mask):\n"
        "    if mask.parallel:\n"
        "        return mask\n"
        "    return dataclasses.replace(mask, query_positions_BT=mask.query_positions_BT + 1)\n"
    )
    broken = broken.replace("from dataclasses", "import dataclasses\nfrom dataclasses")
    plugin = tmp_path / "broken.py"
    plugin.write_text(broken, encoding="utf-8")
    result = contract_run(cwd=ROOT, ATTNZOO_PLUGINS=str(plugin))
    assert result.returncode == 1, result.stdout
    assert "failed" in result.stdout


def test_missing_plugin_is_an_error():
    result = run("-m", "attnzoo", "list", cwd=ROOT, ATTNZOO_PLUGINS="no_such_file.py")
    assert result.returncode != 0
    assert "'no_such_file.py' is not a Python file" in result.stderr


def test_template_itself_is_not_registered():
    assert "mine" not in ATTENTION
