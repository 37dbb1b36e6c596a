"""Prepares a release: checks version and changelog, and builds source distribution and wheel.

    make release            checks, and builds into dist/; changes nothing in the repository
    make release TAG=--tag  also dates the changelog, commits and tags

The version is `attnzoo.__version__`; the changelog begins with it as "## 1.2.0 (unreleased)". The target `release` runs
`make check`, `make docs` and `make test` first. Nothing is pushed or uploaded; the commands for that are printed.
"""

import argparse
import datetime
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attnzoo
from attnzoo.errors import complain

ROOT = Path(__file__).resolve().parent.parent
HEAD = re.compile(r"^## (?P<version>\S+) \((?P<date>[^)]*)\)$", re.MULTILINE)
UNRELEASED = "unreleased"


def check_changelog(text: str, version: str) -> None:
    """Raises ValueError if the changelog's newest section is not that of the version, has a date, or is empty."""
    head = HEAD.search(text)
    if head is None:
        raise ValueError(f"CHANGELOG.md has no section; begin it with '## {version} ({UNRELEASED})'")
    if head["version"] != version:
        raise ValueError(
            f"CHANGELOG.md begins with {head['version']} and attnzoo.__version__ is {version}; change one of them"
        )
    if head["date"] != UNRELEASED:
        raise ValueError(f"{version} was released on {head['date']}; raise attnzoo.__version__ and begin a section")
    after = HEAD.search(text, head.end())
    if not text[head.end() : after.start() if after else None].strip():
        raise ValueError(f"CHANGELOG.md says nothing about {version}")


def dated(text: str, today: datetime.date) -> str:
    """The changelog with its newest section dated."""
    return HEAD.sub(lambda head: f"## {head['version']} ({today.isoformat()})", text, count=1)


def git(*words: str) -> str:
    """Runs git and returns its output. Raises ValueError with its error message."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def release(tag: bool, today: datetime.date) -> None:
    """Checks and builds; with `tag` also dates the changelog, commits and tags. Raises ValueError if a check fails."""
    version, changelog = attnzoo.__version__, ROOT / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    check_changelog(text, version)
    if git("status", "--porcelain"):
        raise ValueError("there are changes that are not committed; commit or stash them")
    name = f"v{version}"
    if git("tag", "--list", name):
        raise ValueError(f"the tag {name} exists; raise attnzoo.__version__")
    if tag:
        changelog.write_text(dated(text, today), encoding="utf-8")
        git("commit", "--quiet", "--message", f"Release {version}", "CHANGELOG.md")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "hatchling", "build"], cwd=ROOT, check=True)
    if tag:
        git("tag", "--annotate", name, "--message", f"attnzoo {version}")
        print(f"tagged {name}; to publish: git push origin main {name} && twine upload dist/*")
    else:
        print(f"{version} is ready to be released: make release TAG=--tag")


def main() -> int:
    """Runs the command; exit status 2, with one line on stderr, if a check fails."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tag", action="store_true", help="date the changelog, commit and tag")
    try:
        release(parser.parse_args().tag, datetime.datetime.now(datetime.UTC).date())
    except ValueError as error:
        return complain("release", str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
