"""The wheel, installed into a fresh environment: every command works in a clean directory, beside a project whose own
modules are called train and serve, and nothing is written into the installation."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from serve.environment import QUIET
from serve.front.port import free_port
from tests.helpers import serving
from tests.helpers.training import ROOT, write_tiny

# Not importorskip: to import pip takes setuptools' own distutils away from this process, and torch's compiler needs it.
MISSING = [name for name in ("hatchling", "pip") if not list(metadata.distributions(name=name))]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} build and install the wheel")


def checked(command: list[str | Path], cwd: Path, **options: object) -> str:
    """What a command prints; fails with its errors where it does."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Installed:
    """An environment with the wheel, and a clean directory in which a project of somebody else lives."""

    def __init__(self, directory: Path) -> None:
        build = f"from hatchling.build import build_wheel; print(build_wheel({str(directory)!r}))"
        self.wheel = directory / checked([sys.executable, "-c", build], ROOT).split()[-1]
        venv = directory / "venv"
        checked([sys.executable, "-m", "venv", "--without-pip", venv], directory)
        self.python = venv / "bin" / "python"
        self.packages = next(venv.glob("lib/python*/site-packages"))
        # What this environment has, but the checkout.
        others = [entry for entry in sys.path if Path(entry).name == "site-packages"]
        (self.packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        checked([*pip, "install", "--quiet", "--no-deps", "--no-index", self.wheel], directory)
        self.clean = directory / "clean"
        self.clean.mkdir()
        for name in ("train", "serve", "scripts"):
            (self.clean / f"{name}.py").write_text("whose = 'the user'\n", encoding="utf-8")
        self.home = directory / "home"
        # Extensions that were compiled for the checkout are the same here, and compiling them takes long.
        extensions = str(ROOT / ".cache" / "torch_extensions")
        own = {"ATTNZOO_HOME": str(self.home), "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": extensions}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and name[:4] != "RAY_"}
        self.environment = {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1"}
        self.before = self.files()

    def command(self, *words: str | Path) -> list[str]:
        return [str(self.python.with_name("attnzoo")), *map(str, words)]

    def attnzoo(self, *words: str | Path) -> str:
        return checked(self.command(*words), self.clean, env=self.environment)

    def files(self) -> dict[Path, int]:
        """What is installed, and when it was written."""
        return {path: path.stat().st_mtime_ns for path in self.packages.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    made = Installed(tmp_path_factory.mktemp("wheel"))
    yield made
    assert made.files() == made.before, "something was written into site-packages"


def test_the_wheel_has_one_name(installed):
    """And holds every file of the repository's rooms that a process may read."""
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"attnzoo"}
    tracked = checked(["git", "ls-files", "attnzoo", "train", "serve", "scripts", "configs"], ROOT).split()
    inside = [name if name.startswith("attnzoo/") else f"attnzoo/_apps/{name}" for name in tracked]
    assert set(inside) <= set(names)
    for module in ("train", "serve", "scripts"):
        code = f"import {module}; print({module}.whose)"
        assert checked([installed.python, "-c", code], installed.clean) == "the user\n"
        code = f"import attnzoo.cli, importlib.util; print(importlib.util.find_spec('{module}'))"
        assert checked([installed.python, "-I", "-c", code], installed.clean) == "None\n"


def test_commands_in_a_clean_directory(installed, tmp_path):
    """In one process, which imports torch once; the console script is seen by `list` and help."""
    assert "\nrcmha " in installed.attnzoo("list")
    assert "attnzoo serve --checkpoint" in installed.attnzoo("serve", "--help")
    assert "attnzoo bench cache --quick" in installed.attnzoo("bench", "cache", "--help")
    checkpoint = serving.export(tmp_path / "tiny", kind="mha")
    commands = [
        ["describe", "rcmha"],
        ["plan", "--model", "rcmha.yaml", "--chip", "h100"],
        ["plan", "--model", "configs/mha.yaml", "--chip", "h100"],
        ["generate", checkpoint, "The slots", "max_new_tokens=3", "--json"],
        ["attention", checkpoint, "The slots"],
        ["export", checkpoint, "exported", "--format", "native"],
        ["compare", "--quick", "--show"],
    ]
    code = "import json, sys\nfrom attnzoo.cli import main\nprint([main(words) for words in json.loads(sys.argv[1])])"
    words = json.dumps([[str(word) for word in command] for command in commands])
    printed = checked([installed.python, "-c", code, words], installed.clean, env=installed.environment)
    assert printed.endswith("[0, 0, 0, 0, 0, 0, 0]\n")
    assert "configs/rcmha.yaml" in printed
    generated = next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert len(generated["outputs"][0]["token_ids"]) == 3
    assert (installed.clean / "exported" / "config.json").is_file()
    assert (installed.clean / "attention.html").stat().st_size > 10_000


@pytest.mark.slow
def test_training(installed, tmp_path):
    """By DeepSpeed's launcher: run directory below the current one, caches in ATTNZOO_HOME, mistakes with status 2."""
    config = write_tiny(tmp_path)
    settings = ["run_dir=runs/tiny", "cache_dir=null", "train.steps=2", "eval.every=null"]
    assert "parameters" in installed.attnzoo("train", "--config", "demo.yaml", "--dry-run", "--ranks", "2")
    installed.attnzoo("train", "--config", config, "--ranks", "2", *settings)
    assert (installed.clean / "runs" / "tiny" / "export" / "config.json").is_file()
    assert {"tokens", "tokenizers"} <= {path.name for path in installed.home.iterdir()}
    wrong = installed.command("train", "--config", config, "--dry-run", "train.stepz=2")
    done = subprocess.run(wrong, cwd=installed.clean, env=installed.environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown key train.stepz; did you mean 'steps'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_serving(installed, tmp_path):
    """Ray's workers find the server's code, not the user's serve.py."""
    command = installed.command("serve", "--checkpoint", serving.export(tmp_path / "tiny"), "--port", "0", "threads=1")
    server = subprocess.Popen(
        command, cwd=installed.clean, env=installed.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        found = re.search(r"serving 'tiny' on (http://127\.0\.0\.1:\d+)", line)
        assert found, f"{line!r}, stderr: {server.stderr.read()}"
        body = json.dumps({"model": "tiny", "prompt": "The", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{found[1]}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert (installed.home / "ray_token").is_file()
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate()


@pytest.mark.slow
def test_rays_own_command(installed, tmp_path):
    """`serve run`, its replica and its proxy find the server's code without a PYTHONPATH; a `serve.py` that Ray's
    workers would take for it is named."""
    checkpoint, port = serving.export(tmp_path / "tiny"), free_port("127.0.0.1", 0)
    ray = [str(installed.python), "-c", "from ray.serve.scripts import cli; cli()", "run"]
    environment = {**installed.environment, **QUIET}
    words = [*ray, "attnzoo.apps:server", f"checkpoint={checkpoint}"]
    refused = subprocess.run(words, cwd=installed.clean, env=environment, capture_output=True, text=True)
    assert "serve.py' hides the server's code from Ray's workers" in refused.stderr
    assert refused.returncode != 0
    config, log = tmp_path / "serve.yaml", tmp_path / "log"
    application = {"name": "attnzoo", "route_prefix": "/", "import_path": "attnzoo.apps:server"}
    application["args"] = {"checkpoint": str(checkpoint), "threads": 1}
    options = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    config.write_text(json.dumps(options))
    with log.open("w") as said:
        server = subprocess.Popen([*ray, str(config)], cwd=tmp_path, env=environment, stdout=said, stderr=said)
    try:
        deadline, url = time.monotonic() + 120, f"http://127.0.0.1:{port}"
        while not answers(f"{url}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        request = urllib.request.Request(f"{url}/-/routes", headers={"host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):  # the guard in Ray's proxy, which is another process
            urllib.request.urlopen(request, timeout=9)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
