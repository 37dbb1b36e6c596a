"""What commands write: every path that a user names for it is checked before any work is done."""

import argparse
import os

import pytest

from attnzoo import files
from attnzoo.cli import COMMANDS, arguments_of, carry_out
from attnzoo.cli.outputs import OutputDirectory, OutputFile, check_outputs
from attnzoo.files import output_directory, output_file, write_atomic
from attnzoo.report import Report
from scripts.exams.cli import add_arguments

CSV = "question,choices,answer\nq,\"{'A': 'yes', 'B': 'no'}\",A\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with one thing of each kind; also the working directory."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "readonly.txt").write_text("mine")
    (tmp_path / "readonly.txt").chmod(0o444)
    (tmp_path / "link").symlink_to("precious.txt")
    (tmp_path / "link_to_fifo").symlink_to("fifo")
    (tmp_path / "q.csv").write_text(CSV)
    return tmp_path


def tree(directory):
    """Everything in a directory: kind, mode and content."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = path.read_text() if path.is_file() else None
        found[path.name] = (status.st_mode, status.st_ino, content)
    return found


REFUSED = [
    ("", "--json='' is not the path of a file"),
    ("-", "--json='-' is not the path of a file, and reports do not go to stdout; write ./- for a file of that name"),
    ("fifo", "--json='fifo' is a device or a pipe, which is not replaced"),
    ("link_to_fifo", "--json='link_to_fifo' is a device or a pipe"),
    ("directory", "--json='directory' is a directory; give the path of a file in it"),
    ("readonly.txt", "--json='readonly.txt' is a read-only file"),
    ("a/b/c.json", "--json='a/b/c.json': there is no directory 'a/b'; make it"),
    ("precious.txt/x.json", "precious.txt' is a file, not a directory"),
    ("n" * 250, "cannot be written (File name too long)"),
    ("q.csv", "--json='q.csv' is also questions, which would be lost"),
    ("./directory/../q.csv", "is also questions, which would be lost"),
    ("a.jsonl", "--answers='a.jsonl' is also --json, which would be lost"),
]


@pytest.mark.parametrize(("path", "message"), REFUSED)
def test_an_exam_is_not_asked_whose_report_cannot_be_written(path, message, place, capsys):
    """`run` is not reached, nothing is changed, and the message names the option and its value."""
    before = tree(place)
    words = ["q.csv", "--url", "http://unreachable", "--answers", "a.jsonl", "--json", path]
    assert carry_out("attnzoo exam", add_arguments, lambda options: pytest.fail("asked"), words) == 2
    assert message in capsys.readouterr().err
    assert tree(place) == before


def test_devices_are_refused_before_they_are_opened(place, monkeypatch):
    """Kills: a check by opening, which a tape or a terminal would notice."""
    real = os.stat("fifo")
    device = os.stat_result((0o020666, *real[1:]))
    monkeypatch.setattr(files.os, "stat", lambda path, **_: device if str(path) == "precious.txt" else real)
    monkeypatch.setattr(files.os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"'precious\.txt' is a device or a pipe"):
        output_file("precious.txt", "--out")


def test_links_are_followed_and_reports_replace_only_files(place):
    """Kills: a rename over the link; a rename over what became a pipe after the check."""
    report = Report(command=[], commit="", seed=0, device="", load_before=0.0, versions={})
    report.write(output_file("link", "--json"))
    assert (place / "link").is_symlink()
    assert (place / "precious.txt").read_text().startswith("{")
    for name in ("fifo", "link_to_fifo", "directory"):
        with pytest.raises(ValueError, match=f"'{name}' is a d"):
            write_atomic(files.Path(name), b"lost")
    report.write(output_file("./-", "--json"))
    assert (place / "-").is_file()
    assert not list(place.glob(".*"))


def test_directories(place):
    for path, message in (
        ("", "--results='' is empty"),
        ("fifo", "fifo' is not a directory"),
        ("precious.txt/below", "precious.txt' is not a directory"),
    ):
        with pytest.raises(ValueError, match=message):
            output_directory(path, "--results")
    assert output_directory("new/below", "--results") == files.Path("new/below")
    assert not (place / "new").exists()


def test_key_value_words_and_lists_are_inputs_too(place):
    for name, value in (("settings", ["steps=2", "text=link"]), ("config", files.Path("precious.txt"))):
        with pytest.raises(ValueError, match=f"is also {'text' if name == 'settings' else name}, which would be lost"):
            check_outputs(argparse.Namespace(**{name: value}, json=OutputFile("precious.txt")))


def _commands(table, name=""):
    for word, command in table.items():
        if isinstance(command, dict):
            yield from _commands(command, f"{name}{word} ")
        else:
            yield f"{name}{word}", command


def test_every_command_has_its_outputs_checked():
    """Kills: a new option for a path to write, that nobody checks."""
    inputs = {("card", "answers")}
    for name, command in _commands(COMMANDS):
        parser = argparse.ArgumentParser()
        arguments_of(command)(parser)
        for action in parser._actions:
            path = action.dest in ("json", "results", "answers", "figures", "figure", "out") and action.nargs != 0
            if path and action.option_strings and (name, action.dest) not in inputs:
                assert action.type in (OutputFile, OutputDirectory), (name, action.dest)
