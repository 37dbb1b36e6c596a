"""When a step fails or hangs, every client hears of it and the server says that it is not well."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.integration.test_serve_routes import post, running, wait_until


def break_after(owner, steps: int, action) -> None:
    step, left = owner.engine.step, iter(range(steps))

    def broken():
        if next(left, None) is None:
            action()
        return step()

    owner.engine.step = broken


def fail():
    raise RuntimeError("SEC" + "RET: out of memory")


def test_a_failing_step_fails_everything_and_says_so(caplog):
    with running(delay_s=0.02, max_num_seqs=2) as (url, owner), ThreadPoolExecutor(4) as pool:
        scheduler, answers = owner.engine.scheduler, []
        for index, stream in enumerate((True, False, True, False)):
            answers.append(pool.submit(post, url, stream=stream, max_tokens=200, ignore_eos=True))
            wait_until(lambda n=index: scheduler.num_running + scheduler.num_waiting > n, "arrived")
        wait_until(
            lambda: owner.engine.metrics.registry.get_sample_value("attnzoo_generation_tokens_total") > 4, "text"
        )
        break_after(owner, 3, fail)
        running_stream, running_whole, waiting_stream, waiting_whole = (answer.result(20) for answer in answers)
        assert running_stream.status_code == 200
        last = running_stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert "[DONE]" not in running_stream.text
        for answer in (running_whole, waiting_stream, waiting_whole):
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
            assert "SECRET" not in answer.text
        assert httpx.get(f"{url}/health").status_code == 503
        assert post(url, max_tokens=2).status_code == 503
        assert "engine step failed: RuntimeError" in caplog.text
        assert "SECRET" not in caplog.text


def test_a_hanging_step_is_noticed():
    release = threading.Event()
    try:
        with running(step_timeout_s=0.2) as (url, owner), ThreadPoolExecutor(1) as pool:
            break_after(owner, 3, lambda: release.wait(30))
            answer = pool.submit(post, url, max_tokens=50, ignore_eos=True)
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 503, "unhealthy")
            assert answer.result(10).status_code == 500
            assert "TimeoutError" in httpx.get(f"{url}/health").json()["error"]["message"]
            release.set()
            time.sleep(0.05)
            assert httpx.get(f"{url}/health").status_code == 503
    finally:
        release.set()
