"""Ray's own `serve deploy` on a cluster that was started by hand: the shipped YAML, and what `serve build` writes."""

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from serve.environment import QUIET
from serve.front.port import free_port
from tests.helpers.ray_server import DEPLOYMENT, ROOT, environment, expected
from tests.helpers.serving import export

BIN = Path(sys.executable).parent
SAID = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_memory_monitor_refresh_ms")
PORTS = ("port", "ray-client-server-port", "dashboard-port", "dashboard-agent-listen-port")


class Cluster:
    """`ray start --head` with the variables that the shipped YAML asks for."""

    def __init__(self, variables: dict[str, str]) -> None:
        # Sockets lie in it, whose paths may have 107 characters.
        self.directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        ports = {name: str(free_port("127.0.0.1", 0)) for name in PORTS}
        self.dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2"]
        command += [f"--temp-dir={self.directory}", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--{name}={value}" for name, value in ports.items()]
        # One token for the cluster and for whoever asks its dashboard.
        self.token = secrets.token_hex(32)
        self.variables = {**self.clean(), **variables, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        with open(f"{self.directory}/started", "w") as said:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.variables, stdout=said, stderr=said)
        wait_for(lambda: answers(f"{self.dashboard}/api/version", self.token), self)

    @staticmethod
    def clean() -> dict[str, str]:
        return {name: value for name, value in environment().items() if name != "RAY_ADDRESS"}

    def serve(self, *words: str | Path) -> str:
        command = [BIN / "serve", *words]
        done = subprocess.run(command, cwd=ROOT, env=self.variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self, path: Path) -> None:
        self.serve("deploy", "--address", self.dashboard, path)

    def stop(self) -> None:
        family = [*self.process_tree()]
        for process in family:
            process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self.process.wait(20)
        shutil.rmtree(self.directory, ignore_errors=True)

    def process_tree(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


def answers(url: str, token: str = "") -> bool:
    try:
        return httpx.get(url, timeout=5, headers={"authorization": f"Bearer {token}"}).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition, cluster: Cluster) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        said = Path(cluster.directory, "started").read_text()
        assert cluster.process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.3)


def names(url: str) -> list[str]:
    try:
        return [card["id"] for card in httpx.get(f"{url}/v1/models", timeout=5).json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError):
        return []


@pytest.mark.slow
def test_the_shipped_deployment_and_a_built_one_run(tmp_path):
    checkpoint = export(tmp_path / "tiny" / "export", max_len=1024)
    settings, shipped, built = (tmp_path / name for name in ("settings.yaml", "deploy.yaml", "built.yaml"))
    settings.write_text(f"checkpoint: {checkpoint}\nmax_num_seqs: 2\nmodel_name: built\n")
    port = free_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}"
    content = yaml.safe_load(DEPLOYMENT.read_text())
    content["http_options"]["port"] = port
    content["applications"][0]["args"]["checkpoint"] = str(checkpoint)
    shipped.write_text(yaml.safe_dump(content))
    front = {name: QUIET[name] for name in SAID}
    assert all(f"{name}={value}" in DEPLOYMENT.read_text() for name, value in front.items())
    cluster = Cluster({**front, "RAY_USAGE_STATS_ENABLED": "0", "ATTNZOO_SERVE_CONFIG": str(settings)})
    try:
        cluster.deploy(shipped)
        wait_for(lambda: names(url) == ["tiny"], cluster)
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 30, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected("Hello", 30)
        # The front stands in Ray's proxy: it is what knows of deadlines for headers and of half-read bodies.
        refused = httpx.get(f"{url}/-/routes", headers={"host": "evil.example"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")

        cluster.serve("build", "attnzoo.apps:application", "--app-dir", ROOT, "--output-path", built)
        content = yaml.safe_load(built.read_text())
        content["http_options"] |= {"host": "127.0.0.1", "port": port}
        built.write_text(yaml.safe_dump(content))
        cluster.deploy(built)
        wait_for(lambda: names(url) == ["built"], cluster)
        answer = httpx.post(f"{url}/v1/completions", json={**body, "model": "built"}, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected("Hello", 30)
    finally:
        cluster.stop()
    assert not answers(f"{url}/health")
