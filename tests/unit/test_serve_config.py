"""Settings: strict, with the nearest name, and the same from a file, from words and from Ray's arguments."""

import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from attnzoo.cli import CommandParser
from attnzoo.types import check_device
from serve.__main__ import add_arguments, read_config, warnings_of
from serve.config import absolute, build_serve_config, parse_settings, read_config_file
from serve.environment import _write_token, prepare_environment
from serve.front.hosts import reachable
from tests.helpers.serving import export, small_model

ROOT = Path(__file__).resolve().parents[2]


def build(*pairs: str):
    return build_serve_config(parse_settings(["checkpoint=runs/demo/export", *pairs]))


def test_values_are_read_by_type():
    config = build("max_num_seqs=3", "port=9000", "drain_timeout_s=2", "api_key_env=KEY", "max_model_len=null")
    assert (config.max_num_seqs, config.port, config.drain_timeout_s, config.api_key_env) == (3, 9000, 2.0, "KEY")
    assert config.max_model_len is None
    assert config.host == "127.0.0.1"


def test_the_served_name_is_the_run():
    assert build().served_name == "demo"
    assert build("model_name=5").served_name == "5"
    assert build_serve_config({"checkpoint": "models/tiny"}).served_name == "tiny"


def test_links_of_a_path_are_followed_once(tmp_path, monkeypatch):
    config, resolve, count = build(), Path.resolve, []
    monkeypatch.setattr(Path, "resolve", lambda self, *given: count.append(1) or resolve(self, *given))
    assert [config.served_name for _ in range(5)] == ["demo"] * 5
    assert len(count) == 1
    assert config == build(), "what is kept is no setting"


def test_checkpoints_are_found_as_load_finds_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNZOO_HOME", str(tmp_path / "home"))
    for place in ("run/export", "home/models/mine"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert absolute("run") == absolute("run/export") == str(tmp_path / "run" / "export")
    assert build_serve_config({"checkpoint": absolute("run")}).served_name == "run"
    assert absolute("mine") == str(tmp_path / "home" / "models" / "mine")
    assert absolute("none") == "none"  # a name for the message that it was not found
    assert absolute("./none") == str(tmp_path / "none")
    assert (absolute("smollm2"), absolute(None)) == ("smollm2", None)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("max_num_seq=3", "did you mean 'max_num_seqs'"),
        ("max_num_seqs=three", "max_num_seqs='three'"),
        ("max_num_seqs=0", "max_num_seqs=0"),
        ("max_batched_tokens=8", "max_batched_tokens=8"),
        ("max_queue=-1", "max_queue=-1"),
        ("port=70000", "port=70000"),
        ("step_timeout_s=0", "step_timeout_s"),
        ("drain_timeout_s=-1", "drain_timeout_s"),
        ("drain_timeout_s=.nan", r".nan is not a finite number"),
        ("drain_timeout_s=.inf", r".inf is not a finite number"),
        ("step_timeout_s=.nan", r".nan is not a finite number"),
        ("header_timeout_s=0", "header_timeout_s=0"),
        ("body_timeout_s=.inf", r".inf is not a finite number"),
        ("write_timeout_s=-3", "write_timeout_s=-3"),
        ("max_reading=0", "max_reading=0"),
        ("max_queue=10000000000000000000000", "max_queue=1000"),
        ("max_num_seqs=1000001", "at most 1000000"),
        ("allowed_hosts=[http://a.example]", "'http://a.example' is not a host name"),
        ("allowed_hosts=[5]", "5 is not a host name"),
        ("allowed_hosts=api.example", "allowed_hosts='api.example' has type str"),
        ("stream_interval_ms=-1", "stream_interval_ms"),
        ("max_body_bytes=0", "max_body_bytes"),
        ("threads=0", "threads=0"),
        ("cache={policy: full, x: 1}", "unknown key cache.full.x; cache.full has no options"),
        ("dtype=fp23", "fp23"),
        ("max_queue=[", "max_queue"),
        ("max_queue", "is not of the form key=value, for example port=8001"),
        ("=5", "is not of the form key=value, for example port=8001"),
    ],
)
def test_mistakes_are_named(pair, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(pair)


@pytest.mark.parametrize(
    ("words", "checkpoint", "port"),
    [
        (["runs/x"], "runs/x", 8000),
        (["runs/x", "port=8001"], "runs/x", 8001),
        (["port=8001", "--checkpoint", "runs/x"], "runs/x", 8001),
        (["--port", "8002", "runs/x", "max_num_seqs=2"], "runs/x", 8002),
        (["checkpoint=runs/x"], "runs/x", 8000),
        (["--checkpoint", "runs/a=1"], "runs/a=1", 8000),
    ],
    ids=str,
)
def test_the_checkpoint_is_the_first_word(words, checkpoint, port, monkeypatch):
    monkeypatch.setattr("serve.__main__.check_checkpoint", lambda config: None)
    parser = CommandParser()
    add_arguments(parser)
    config = read_config(parser.parse_intermixed_args(words))
    assert (config.checkpoint, config.port) == (str(Path(checkpoint).absolute()), port)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/x", "--checkpoint", "runs/y"], "'runs/x' is not of the form key=value"),
        (["runs/x", "runs/y"], "'runs/y' is not of the form key=value"),
    ],
    ids=str,
)
def test_two_checkpoints_are_refused(words, message):
    parser = CommandParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        read_config(parser.parse_intermixed_args(words))


def test_sequences_longer_than_the_models_are_refused_before_ray_starts(tmp_path):
    export(tmp_path / "tiny", "mha")
    most = small_model("mha").config.max_positions
    for length, words in ((100_000, f"is more than the model's max_positions={most}"), (1, "leaves no room for a")):
        parser = CommandParser()
        add_arguments(parser)
        with pytest.raises(ValueError, match=f"max_model_len={length} {words}"):
            read_config(parser.parse_intermixed_args([str(tmp_path / "tiny"), f"max_model_len={length}"]))


def test_an_open_server_says_so():
    def said(**settings):
        return list(warnings_of(build_serve_config({"checkpoint": "smollm2", **settings})))

    assert said() == said(host="localhost") == said(host="0.0.0.0", api_key_env="KEY") == []
    for host in ("0.0.0.0", "10.0.0.1", "example.com"):
        (line,) = said(host=host)
        assert line.startswith(f"host={host} without api_key_env: everyone who can reach this machine")
    assert [reachable(host) for host in ("0.0.0.0", "::", "127.0.0.1", "10.0.0.1", "a.example")] == [
        "127.0.0.1",
        "127.0.0.1",
        "127.0.0.1",
        "10.0.0.1",
        "a.example",
    ]


def test_a_checkpoint_is_needed():
    with pytest.raises(ValueError, match="checkpoint is missing"):
        build_serve_config({})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/serve").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs(path):
    build_serve_config({"checkpoint": "x", **read_config_file(path)})


def test_files_that_hold_no_mapping(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert read_config_file(tmp_path / "empty.yaml") == {}
    (tmp_path / "list.yaml").write_text("- 5")
    with pytest.raises(ValueError, match=r"list\.yaml: the file holds a list"):
        read_config_file(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match=r"missing\.yaml"):
        read_config_file(tmp_path / "missing.yaml")


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("drain_timeout_s: 2e1\ncache: {policy: d2o, keep_ratio: 2e-1}\n")
    for values in (
        parse_settings(["drain_timeout_s=2e1", "cache={policy: d2o, keep_ratio: 2e-1}"]),
        read_config_file(path),
        {"drain_timeout_s": "2e1", "cache": {"policy": "d2o", "keep_ratio": "2e-1"}},  # by a reader of YAML 1.1
    ):
        config = build_serve_config({"checkpoint": "x", **values})
        assert config.drain_timeout_s == 20.0
        assert config.cache is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nport: 2\n", r"serve.yaml:2: port is set twice, first in line 1"),
        ("cache:\n  policy: d2o\n  policy: think\n", r"serve.yaml:3: cache.policy is set twice"),
        ("drain_timeout_s: .nan\n", r"serve.yaml:1: drain_timeout_s=.nan is not a finite number"),
        ("step_timeout_s: .inf\n", r"serve.yaml:1: step_timeout_s=.inf is not a finite number"),
        ("port: [1\n", r"serve.yaml: cannot be read as YAML"),
        ("- 1\n", r"holds a list"),
    ],
)
def test_mistakes_in_files_have_their_line(tmp_path, text, message):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config_file(path)


@pytest.mark.parametrize("pair", ["drain_timeout_s=.nan", "step_timeout_s=.inf", "cache={policy: d2o, policy: think}"])
def test_mistakes_in_words_are_named(pair):
    with pytest.raises(ValueError, match=r"^(drain_timeout_s|step_timeout_s|cache): .*(finite|twice)"):
        parse_settings([pair])


@pytest.mark.parametrize("device", ["x", "", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device={device!r}"):
        check_device(device)
    check_device("cpu")


def test_servers_that_start_at_once_share_a_token(tmp_path):
    """Whole, for its owner's eyes, and the one that the first of them left."""
    path = tmp_path / "home" / "ray_token"

    def start(turn: int) -> str:
        _write_token(path)
        return path.read_text()

    def slowly(count: int) -> str:
        time.sleep(0.02)  # so that others come in between
        return os.urandom(count).hex()

    with patch("serve.environment.secrets.token_hex", slowly), ThreadPoolExecutor(8) as pool:
        (token,) = set(pool.map(start, range(32)))
    with patch.dict(os.environ):
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            os.environ.pop(name, None)
        prepare_environment(path.parent)
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(path)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text() == token
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
