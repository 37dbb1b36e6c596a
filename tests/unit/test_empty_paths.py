"""An empty path is refused: it would be the working directory, which nobody has named."""

from pathlib import Path

import pytest

from attnzoo.cli import main
from attnzoo.files import user_path
from tests.helpers.clinical_files import write_stays
from train.main import main as train

COMMANDS = {
    "RUN": ["card", ""],
    "--answers": ["card", ".", "--answers", ""],
    "questions": ["exam", "", "--url", "http://127.0.0.1:9/v1"],
    "data": ["case-study", "", "--url", "http://127.0.0.1:9/v1"],
    "--config": ["serve", "--config", ""],
    "--data": ["reproduce", "tscan", "--data", ""],
    "--run": ["reproduce", "tscan", "--run", ""],
    "out": ["export", "smollm2", ""],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_that_is_an_empty_path(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(COMMANDS[name])
    assert ended.value.code == 2
    assert f"argument {name}: is empty; give a path" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["clinical", "diffusion", "sensors", "pictures"])
def test_a_setting_of_the_server_that_is_an_empty_path(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "smollm2", f"{key}="]) == 2
    assert f"{key}='' is empty; give a path" in capsys.readouterr().err


def test_data_and_checkpoints_of_a_run_that_are_empty_paths(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "tscan-mortality.yaml", "--dry-run"]
    assert train([*words, "data.path=''"]) == 2
    assert "data.path='' is empty; give a path" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    assert train([*words, f"data.path={write_stays(tmp_path)}", "data.outcomes=''"]) == 2
    assert "outcomes='' is empty; give a path" in capfd.readouterr().err


def test_user_path_refuses_it_by_name() -> None:
    with pytest.raises(ValueError, match="here='' is empty; give a path"):
        user_path("", "here")
