"""A replica that is killed is replaced, and the clients it served hear of it."""

import time

import httpx
import psutil
import pytest

from tests.integration.test_serve_ray import Running


@pytest.mark.slow
def test_a_killed_replica_is_replaced(tmp_path):
    server = Running(tmp_path)
    try:
        replica = next(process for process in server.family() if "ServeReplica" in " ".join(process.cmdline()))
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1000, "stream": True, "ignore_eos": True}
        text: list[str] = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
            parts = response.iter_text()
            text.append(next(parts))
            psutil.Process(replica.pid).kill()
            with pytest.raises(httpx.HTTPError):
                text.extend(parts)
        assert text
        assert "[DONE]" not in "".join(text)
        deadline = time.perf_counter() + 60
        while time.perf_counter() < deadline:
            try:
                answer = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False, "max_tokens": 3})
            except httpx.HTTPError:
                continue
            if answer.status_code == 200:
                break
            time.sleep(0.2)
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        server.process.terminate()
        server.process.wait(60)
    assert server.process.returncode == 0
