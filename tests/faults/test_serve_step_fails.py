"""When a step fails or hangs, every client hears of it and the server says that it is not well."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from serve.async_engine import MAX_FAULTS
from serve.faults import DeviceError
from tests.helpers.http_server import post, running, wait_until


def break_after(owner, steps: int, action, times: int = 1) -> None:
    """The engine's step does `action` before its work, after so many steps and so many times."""
    step, calls = owner.engine.step, iter(range(10**9))

    def broken():
        if owner.engine.scheduler.has_work() and steps <= next(calls) < steps + times:
            action()
        return step()

    owner.engine.step = broken


def fail():
    raise RuntimeError("SEC" + "RET: out of memory")


def dead():
    raise DeviceError("SEC" + "RET: gone")


def ask_four(owner, pool, url) -> list:
    """Answers to be: a stream and a whole one that run, and a stream and a whole one that wait."""
    scheduler, answers = owner.engine.scheduler, []
    for index, stream in enumerate((True, False, True, False)):
        answers.append(pool.submit(post, url, stream=stream, max_tokens=200, ignore_eos=True))
        wait_until(lambda n=index: scheduler.num_running + scheduler.num_waiting > n, "arrived")
    count = owner.engine.metrics.registry.get_sample_value
    wait_until(lambda: count("attnzoo_generation_tokens_total") > 4, "text")
    return answers


def check_failed(answers, code: str) -> None:
    running_stream, running_whole, waiting_stream, waiting_whole = (answer.result(20) for answer in answers)
    assert running_stream.status_code == 200
    last = running_stream.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert "[DONE]" not in running_stream.text
    for answer in (running_whole, waiting_stream, waiting_whole):
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "SECRET" not in answer.text


def test_a_step_that_fails_as_a_whole_fails_everything_in_it_and_the_engine_goes_on(caplog):
    with running(delay_s=0.02, max_num_seqs=2) as (url, owner), ThreadPoolExecutor(4) as pool:
        expected = post(url, max_tokens=5, ignore_eos=True, temperature=0).json()["choices"]
        answers = ask_four(owner, pool, url)
        break_after(owner, 3, fail)
        check_failed(answers, "request_failed")
        assert httpx.get(f"{url}/health").status_code == 200
        assert post(url, max_tokens=5, ignore_eos=True, temperature=0).json()["choices"] == expected
        assert "engine step failed, and all requests in it: RuntimeError" in caplog.text
        assert "SECRET" not in caplog.text


@pytest.mark.parametrize("action", [fail, dead])
def test_an_engine_that_cannot_go_on_ends_and_says_so(action, caplog):
    """The device is gone, or step after step fails."""
    with running(delay_s=0.02, max_num_seqs=2) as (url, owner), ThreadPoolExecutor(4) as pool:
        answers = ask_four(owner, pool, url)
        break_after(owner, 3, action, times=100)
        check_failed(answers, "engine_failed" if action is dead else "request_failed")
        for _ in range(MAX_FAULTS - 1 if action is fail else 0):
            assert post(url, max_tokens=2).status_code == 500
        assert httpx.get(f"{url}/health").status_code == 503
        assert post(url, max_tokens=2).status_code == 503
        assert "the engine failed and ends: " in caplog.text
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
