"""What a release asks of version and changelog."""

import datetime
from pathlib import Path

import pytest

import attnzoo
from scripts.release import check_changelog, dated

TEXT = "# Changelog\n\n## 1.2.0 (unreleased)\n\n- Something.\n\n## 1.1.0 (2026-01-02)\n\n- Older.\n"


def test_the_changelog_here_is_of_this_version():
    check_changelog((Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8"), attnzoo.__version__)


@pytest.mark.parametrize(
    ("text", "version", "problem"),
    [
        (TEXT, "1.3.0", r"begins with 1\.2\.0 and attnzoo\.__version__ is 1\.3\.0"),
        (TEXT.replace("unreleased", "2026-03-04"), "1.2.0", r"was released on 2026-03-04; raise"),
        (TEXT.replace("- Something.", ""), "1.2.0", r"says nothing about 1\.2\.0"),
        ("# Changelog\n", "1.2.0", r"has no section; begin it with '## 1\.2\.0 \(unreleased\)'"),
    ],
)
def test_what_does_not_agree_is_said(text, version, problem):
    with pytest.raises(ValueError, match=problem):
        check_changelog(text, version)


def test_only_the_newest_section_gets_a_date():
    assert dated(TEXT, datetime.date(2026, 5, 6)) == TEXT.replace("unreleased", "2026-05-06")
