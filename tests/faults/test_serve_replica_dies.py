"""A replica that is killed is replaced, and the clients it served hear of it. Ray's own processes are not replaced: the
command ends when one is killed."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.helpers.ray_server import Running, environment
from tests.helpers.serving import export

BODY = {"model": "tiny", "prompt": "Hi", "max_tokens": 1000, "ignore_eos": True}


def complete(url: str, **fields) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**BODY, **fields}, timeout=60)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_replica_is_replaced(tmp_path):
    server = Running(tmp_path, "max_num_seqs=2")
    try:
        replica = next(process for process in server.family() if "ServeReplica" in " ".join(process.cmdline()))
        with ThreadPoolExecutor(3) as pool:
            streams = [pool.submit(complete, server.url, stream=True) for _ in range(2)]
            wait_for(lambda: server.metric("generation_tokens_total") > 4, "text")
            waiting = pool.submit(complete, server.url)
            wait_for(lambda: server.metric("num_requests_waiting") == 1, "waiting")
            psutil.Process(replica.pid).kill()
            began = time.monotonic()
            for stream in (stream.result() for stream in streams):
                assert stream.status_code == 200
                last = stream.text.strip().split("\n\n")[-1]
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
                assert "[DONE]" not in stream.text
            for answer in (waiting.result(), complete(server.url), httpx.get(f"{server.url}/v1/models", timeout=60)):
                # A new replica may already be there on a fast machine.
                if answer.status_code != 200:
                    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                    assert answer.json()["error"]["code"] == "unavailable"
            print(f"all heard after {time.monotonic() - began:.1f} s")
        wait_for(lambda: complete(server.url, max_tokens=3).status_code == 200, "replaced")
        assert complete(server.url, max_tokens=3).json()["usage"]["completion_tokens"] == 3
        wait_for(lambda: any("answering again" in line for line in server.errors), "said on the terminal")
        assert any("not answering: /health: 503" in line for line in server.errors)
        kill_while_it_drains(server)
    finally:
        server.process.kill()
        server.process.wait(60)


def kill_while_it_drains(server: Running) -> None:
    """Kills Ray's memory of everything, without which nothing in Ray answers, while a request runs."""
    family = server.family()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(complete, server.url, stream=True)
        wait_for(lambda: server.metric("num_requests_running") == 1, "running")
        server.process.terminate()
        wait_for(lambda: any("finishing" in line for line in server.errors), "draining")
        next(process for process in family if "gcs_server" in process.name()).kill()
        assert server.process.wait(15) == 1
        with pytest.raises(httpx.RemoteProtocolError):
            stream.result()
    assert not [process for process in family if process.is_running()]
    wait_for(lambda: any("Ray's process gcs_server has ended" in line for line in server.errors), "said")
    assert "Traceback" not in "".join(server.errors)


@pytest.mark.slow
def test_a_ray_that_is_killed_while_the_model_loads_ends_the_command(tmp_path):
    checkpoint = export(tmp_path / "tiny" / "export", max_len=64)
    command = [sys.executable, "-m", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        family = psutil.Process(process.pid).children
        wait_for(lambda: any("Serve" in child.name() for child in family(recursive=True)), "Ray Serve")
        started = family(recursive=True)
        next(child for child in started if child.name() == "raylet").kill()
        printed, errors = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait(10)
    assert (process.returncode, printed) == (1, "")
    assert "Ray's process raylet has ended, and the server with it; start it again" in errors
    assert "Traceback" not in errors
    assert not [child for child in started if child.is_running()]
