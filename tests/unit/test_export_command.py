"""`attnzoo export`, and what no export may write over."""

import json
from pathlib import Path

import pytest

import attnzoo.hf
from attnzoo.checkpoint import export_model, load_model, load_tokenizer, open_checkpoint, save_model
from attnzoo.cli import main
from attnzoo.tokenizer.convert import to_huggingface
from tests.helpers import serving
from tests.helpers.foreign_tokenizers import check_same
from tests.helpers.open_weights import (
    check_same_model,
    demo_model,
    reference,
)


def run(capsys, *arguments):
    status = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command(tmp_path, capsys):
    native, own = tmp_path / "mha", tmp_path / "rcmha"
    save_model(native, demo_model(), tokenizer=serving.tokenizer())
    save_model(own, serving.small_model("rcmha"))
    status, out, _ = run(capsys, native, tmp_path / "a")
    assert status == 0
    assert f"llama, {demo_model().num_parameters():,} parameters, torch.float32" in out
    check_same_model(load_model(tmp_path / "a"), load_model(native))
    status, out, _ = run(capsys, own, tmp_path / "b")
    assert status == 0
    for text in ("attnzoo,", "kind='rcmha' in layer 0", "without a tokenizer", "import attnzoo.hf, then"):
        assert text in out
    assert open_checkpoint(tmp_path / "b").config == load_model(own).config
    status, out, _ = run(capsys, native, tmp_path / "a", "--format", "attnzoo")  # replaces the model that is there
    assert status == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "attnzoo"
    # An export is a checkpoint like any other.
    assert run(capsys, tmp_path / "a", tmp_path / "c", "--format", "native")[0] == 0
    check_same_model(load_model(tmp_path / "c"), load_model(native))
    check_same(load_tokenizer(tmp_path / "c"), to_huggingface(serving.tokenizer()))


def test_command_refuses(tmp_path, capsys):
    own = save_model(tmp_path / "rcmha", serving.small_model("rcmha"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for arguments, message in (
        ((own, tmp_path / "b", "--format", "native"), "kind='rcmha' in layer 0"),
        ((tmp_path / "none", tmp_path / "b"), "none' does not exist; give a directory"),
        ((own, own), "holds the checkpoint itself"),
        ((own, tmp_path), "holds the checkpoint itself"),
        ((own, tmp_path / "other"), "holds 'letter.txt', and no earlier export; give a new directory"),
        ((own, tmp_path / "other" / "letter.txt" / "b"), "letter.txt', which is a file; give another directory"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert message in err
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    assert "attnzoo export runs/rcmha out" in capsys.readouterr().out


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def foreign(directory: Path, what: str) -> None:
    """What someone may keep where an export is asked for."""
    if what in ("sources", "any configuration"):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    if what == "sources":
        (directory / ".git").mkdir()
        (directory / ".git" / "HEAD").write_text("ref: refs/heads/main")
        (directory / "train.py").write_text("print('years of work')")
    elif what == "trained here":
        save_model(directory, demo_model())
    elif what == "of others":
        reference("llama").save_pretrained(directory)
    elif what == "a marker of someone else":
        directory.mkdir()
        (directory / "attnzoo_export.json").write_text('{"files": {}}')
    elif what == "damaged marker":
        export_model(directory, demo_model())
        (directory / "attnzoo_export.json").write_text("{" * 100_000)
    elif what == "a file":
        directory.write_text("text")
    elif what == "notes beside an export":
        export_model(directory, demo_model())
        (directory / "README.md").write_text("what I found")
    elif what == "a directory beside an export":
        export_model(directory, demo_model())
        (directory / ".git").mkdir()
    elif what == "an export trained further":
        export_model(directory, demo_model())
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    elif what == "a link in place of a file":
        export_model(directory, demo_model())
        (directory / "config.json").rename(directory.parent / "elsewhere.json")
        (directory / "config.json").symlink_to(directory.parent / "elsewhere.json")


FOREIGN = [
    "sources", "any configuration", "trained here", "of others", "a marker of someone else", "damaged marker",
    "a file", "notes beside an export", "a directory beside an export", "an export trained further",
    "a link in place of a file",
]  # fmt: skip


@pytest.mark.parametrize("form", ["native", "attnzoo"])
@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_but_an_earlier_export_is_replaced(what, form, tmp_path, capsys):
    source = save_model(tmp_path / "source", demo_model())
    foreign(tmp_path / "out", what)
    before = contents(tmp_path)
    capsys.readouterr()  # transformers' progress
    status, out, err = run(capsys, source, tmp_path / "out", "--format", form)
    assert (status, out) == (2, "")
    assert err.startswith(f"attnzoo export: error: OUT: '{tmp_path / 'out'}")
    assert "give a" in err
    for write in (export_model, attnzoo.hf.export_model):
        with pytest.raises(ValueError, match=r"give a( new)? directory"):
            write(tmp_path / "out", demo_model())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "what", [what for what in FOREIGN if what not in ("trained here", "a link in place of a file")]
)
def test_nothing_but_an_earlier_model_is_replaced(what, tmp_path):
    """`save_model`, which training calls for its export/."""
    foreign(tmp_path / "out", what)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"give a( new)? directory"):
        save_model(tmp_path / "out", demo_model())
    assert contents(tmp_path) == before


def test_links_lead_to_the_directory_that_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export_model(tmp_path / "link", demo_model())
    assert (tmp_path / "link").is_symlink()
    check_same_model(load_model(tmp_path / "real"), demo_model())
