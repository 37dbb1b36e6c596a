"""What the server's command says before anything is served, and what Ray's own files of deployments hold."""

import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from serve.__main__ import main
from serve.config import ServeConfig
from tests.helpers.ray_server import DEPLOYMENT, ROOT, environment
from tests.helpers.serving import export

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own deprecations
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import build as build_command

    from serve import deployment
    from serve.deployment import app, explain_failure, free_port

TRACE = 'Error:\nTraceback (most recent call last):\n  File "x.py", line 5, in f\n    g()\n    ^^^\n'


def status_of(words: list[str]) -> int | str | None:
    """The exit status of the command in this process."""
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to serve"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", "x", "max_num_seq=4"], "did you mean 'max_num_seqs'"),
        (["--checkpoint", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--checkpoint", "x", "--port", "http"], "--port"),
        (["--checkpoint", "x", "port=-5"], "port=-5"),
        (["--checkpoint", "x", "verbose"], "is not of the form key=value, for example port=8001"),
    ],
    ids=str,
)
def test_usage_errors_exit_2(words, message, capsys):
    assert status_of(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_where_nothing_can_be_served_is_said_before_ray_starts(tmp_path, capsys):
    checkpoint = export(tmp_path / "tiny" / "export", max_len=64)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in [
            ([checkpoint, "--port", port], f"cannot listen on 127.0.0.1:{port} (Address already in use)"),
            ([checkpoint, "host=::1"], "a host that is an IPv4 address or name of this machine"),
            ([checkpoint, "host="], "host='' is empty; give 127.0.0.1"),
            ([""], "checkpoint='' names nothing"),
            (
                [checkpoint / "config.json"],
                f"a checkpoint is a directory (its directory, {checkpoint}, looks like one)",
            ),
            ([Path(__file__)], "is a file; a checkpoint is a directory, or a file whose name ends in .gguf"),
        ]:
            assert status_of(["--checkpoint", *map(str, words)]) == 2
            assert message in capsys.readouterr().err


def test_usage_errors_of_the_command():
    command = [sys.executable, "-m", "serve", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert "name what to serve" in done.stderr


def test_what_ends_the_constructor_reaches_the_terminal(tmp_path):
    """The engine says it in the replica's process, where nobody looks."""
    checkpoint = export(tmp_path / "tiny" / "export", "linear", max_len=64)
    command = [sys.executable, "-m", "serve", "--checkpoint", str(checkpoint), "--port", "0", "cache={policy: d2o}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert "attnzoo serve: error: cache: linear attention keeps a state of constant size" in done.stderr
    assert "Failed to update" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (TRACE + "ValueError: first\nsecond: line", "ValueError: first\nsecond: line"),
        (TRACE + "KeyError: 'x'\n\nDuring handling of the above exception:\n\n" + TRACE + "OSError: y", "OSError: y"),
        ("Error:\nActorDiedError()", "without an exception"),
        ("Deployment is waiting for CPUs", "Deployment is waiting for CPUs"),
        ("", "see the logs"),
    ],
    ids=range(5),
)
def test_why_a_deployment_failed(message, expected):
    found = explain_failure(message)
    assert expected in found
    assert "Traceback" not in found


def test_a_ray_that_does_not_start_is_said_in_a_line(monkeypatch):
    def late(**_):
        raise Exception("The current node timed out during startup. This could happen because some raylet failed.")

    monkeypatch.setattr(deployment.ray, "init", late)
    monkeypatch.setattr(deployment.ray._private.worker, "listen_error_messages", None)
    monkeypatch.setenv(deployment.VARIABLE, "")
    with pytest.raises(RuntimeError, match=r"^Ray did not start: The current node timed out during startup; .*again$"):
        deployment._connect(ServeConfig(checkpoint="none"))


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "curl" in capsys.readouterr().out


def test_the_builder_is_strict(tmp_path):
    application = app({"checkpoint": str(tmp_path), "max_num_seqs": "3"})
    config = application._bound_deployment.init_args[0]
    assert (config.max_num_seqs, config.checkpoint) == (3, str(tmp_path))
    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        app({"checkpoint": "x", "max_num_seq": "3"})
    with pytest.raises(ValueError, match="port is set by Ray's own options"):
        app({"checkpoint": "x", "port": "3"})
    with pytest.raises(ValueError, match="checkpoint is missing"):
        app({})


def test_the_shipped_deployment_is_valid():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(DEPLOYMENT.read_text(encoding="utf-8")))
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "attnzoo.apps:server"
    config = app(application.args)._bound_deployment.init_args[0]
    assert (config.max_num_seqs, config.allowed_hosts) == (8, None)


def test_serve_build_writes_a_deployment(tmp_path, monkeypatch):
    """Ray's command gives no arguments, so the settings are a file's."""
    settings, written = tmp_path / "settings.yaml", tmp_path / "deploy.yaml"
    settings.write_text(f"checkpoint: {tmp_path}\nmax_num_seqs: 3\nmax_queue: 5\nport: 9000\n")
    command = ["attnzoo.apps:application", "--app-dir", str(ROOT), "--output-path", str(written)]
    monkeypatch.setenv("ATTNZOO_SERVE_CONFIG", str(settings))
    done = CliRunner().invoke(build_command, command)
    assert done.exit_code == 0, done.output
    schema = ServeDeploySchema.model_validate(yaml.safe_load(written.read_text()))
    (application,) = schema.applications
    assert application.import_path == "attnzoo.apps:application"
    assert application.deployments[0].max_ongoing_requests == 4 * (3 + 5 + 16 + 16) + 64
    monkeypatch.delenv("ATTNZOO_SERVE_CONFIG")
    done = CliRunner().invoke(build_command, command)
    assert "set ATTNZOO_SERVE_CONFIG to a YAML file" in str(done.exception)
    settings.write_text("max_num_seq: 3")
    monkeypatch.setenv("ATTNZOO_SERVE_CONFIG", str(settings))
    done = CliRunner().invoke(build_command, command)
    assert "did you mean 'max_num_seqs'" in str(done.exception)


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0
