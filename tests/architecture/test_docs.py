"""What README and configs say is so."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from attnzoo.attention import ATTENTION
from attnzoo.models import build_shapes
from scripts.draw_architecture import PICTURE, draw
from scripts.render_reference import commands, configuration
from scripts.render_tables import DOCUMENTS, RESULTS, render
from tests.helpers import serving
from tests.helpers.clinical_data import small_cohort, small_wearables
from tests.helpers.clinical_texts import text_cohort
from train.config_reader import load_config
from train.plan import describe
from train.tasks import ClinicalTask, LanguageTask, SensorTask, build_task
from train.tasks.cohort import CohortTask

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
NAMING = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "DECISIONS.md", "SECURITY.md")),
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in ("lab-notes.md", "commands.md")),
]
"""Documents that name files of today."""
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_stored_results(document):
    text = document.read_text(encoding="utf-8")
    assert render(text) == text, "run python scripts/render_tables.py"


@pytest.mark.parametrize("document", NAMING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_documents_name_exist(document):
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.-])((?:attnzoo|train|serve|scripts|tests|configs|docs)/[\w/.-]*\w)", text):
        assert (ROOT / path).exists() or path.startswith("attnzoo/attention/mine"), f"{document.name} names {path}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_that_ships_can_be_planned(name, tmp_path):
    config = load_config(name, [])
    if config.task.get("kind") == "sensor-lm":  # its language model comes in a package that need not be here
        config.model["language_model"] = str(serving.export(tmp_path / "lm"))
        config.task["questions"] = {"fatigue": "Tired?"}
    task = build_task(config)
    if isinstance(task, SensorTask):
        task.cohort = small_wearables()
    elif isinstance(task, CohortTask):
        task.cohort = small_cohort(hours=48) if isinstance(task, ClinicalTask) else text_cohort()
    if isinstance(task, ClinicalTask) and task.options.hourly:
        task.cohort.labels[task.options.label] = np.zeros((len(task.cohort), 48), np.float32)
    language = isinstance(task, LanguageTask)
    printed = describe(task, build_shapes(config.model_config(2048)) if language else task.shapes(), 2)
    assert "parameters" in printed


@pytest.mark.parametrize("kind", ["mha", "rmha", "mdha", "rcmha", "linear", "mesa"])
def test_every_variant_has_a_config_and_a_line_in_the_readme(kind):
    assert kind in ATTENTION
    assert f"{kind}.yaml" in CONFIGS
    assert f"| `{kind}` |" in README.read_text(encoding="utf-8")


def anchors(text):
    """What links to a document's headings say after #."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title)).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "DECISIONS.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    """Pages below docs/ are checked when the site is built."""
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]+))?\)", (ROOT / document).read_text("utf-8")):
        path = ROOT / (target or document)
        assert path.exists(), f"{document} links to {target}"
        assert not anchor or anchor in anchors(path.read_text("utf-8")), f"{document} links to {target}#{anchor}"


def test_the_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_the_reference_of_keys_is_current_and_explains_every_key():
    text = configuration()
    assert (ROOT / "docs/reference/configuration.md").read_text("utf-8") == text, (
        "run python scripts/render_reference.py"
    )
    unsaid = [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not unsaid, "say what they mean in the class's docstring"


def test_the_reference_of_commands_is_current():
    """By words: how argparse lays out its help differs between versions of Python."""
    words = [
        set(re.findall(r"[\w-]+", text))
        for text in ((ROOT / "docs/reference/commands.md").read_text("utf-8"), commands())
    ]
    assert words[0] == words[1], "run python scripts/render_reference.py"


def test_the_picture_of_the_rooms_is_current():
    assert PICTURE.read_text("utf-8") == draw(), "run python scripts/draw_architecture.py"


def test_no_machine_paths_nor_unfinished_merges():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    home = re.compile(r"/(home|root|Users)/\w")
    for name in filter(None, tracked.split("\0")):
        if not name.endswith((".png", "test_docs.py")):
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not home.search(text), name
            assert not re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE), f"{name} holds a merge that was not ended"


@pytest.mark.parametrize("section", ["symbols", "text"])
def test_a_table_names_the_run_of_its_section(section):
    report = json.loads((RESULTS / "bench_cache.json").read_text(encoding="utf-8"))
    runs = {row["section"]: row for row in report["rows"] if row["table"] == "runs"}
    rendered = render(f"<!-- rows bench_cache.json {section} -->\n<!-- end -->")
    assert f"`{runs[section]['command']}`, commit {runs[section]['commit']}" in rendered
