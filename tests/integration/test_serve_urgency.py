"""Over HTTP: urgent requests before others, and answers that end in time."""

import threading

import httpx
import pytest

from tests.helpers.http_server import events, post, running

SLOW_S = 0.02
"""Of a step, so that a request is seen to arrive while another runs."""


@pytest.fixture(scope="module")
def url():
    with running(max_num_seqs=1, delay_s=SLOW_S, priorities=True) as (found, _):
        yield found


def test_an_urgent_answer_comes_first_and_the_other_is_as_it_would_have_been(url):
    usual = {"prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    alone = post(url, **usual).json()["choices"][0]["text"]
    ended: list[str] = []
    texts = {}

    def ask(name, **body):
        texts[name] = post(url, **body).json()["choices"][0]["text"]
        ended.append(name)

    first = threading.Thread(target=ask, args=("usual",), kwargs=usual)
    first.start()
    while "attnzoo_num_requests_running 1.0" not in httpx.get(f"{url}/metrics").text:
        pass
    ask("urgent", prompt=[9, 8], max_tokens=2, priority=-1)
    first.join()
    assert ended == ["urgent", "usual"]
    assert texts["usual"] == alone
    assert 'attnzoo_num_preemptions_total{state="kept"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_deadline_is_a_reason_to_end(url):
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "deadline_s": 20 * SLOW_S}
    whole = post(url, **body).json()
    assert whole["choices"][0]["finish_reason"] == "deadline"
    assert 0 < whole["usage"]["completion_tokens"] < 60
    stream = events(post(url, **body, stream=True).text)
    assert stream[-1]["choices"][0]["finish_reason"] == "deadline"
    assert "".join(event["choices"][0]["text"] for event in stream)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 1001),
        ("priority", 0.5),
        ("priority", "1"),
        ("deadline_s", 0),
        ("deadline_s", -1),
        ("deadline_s", "2"),
    ],
)
def test_a_wrong_value_is_named(url, field, value):
    answer = post(url, prompt="a", **{field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]


def test_a_server_that_takes_all_alike_refuses_a_priority():
    with running() as (url, _):
        assert post(url, prompt="a", max_tokens=1, priority=0).status_code == 200
        assert post(url, prompt="a", max_tokens=1, priority=None).status_code == 200
        answer = post(url, prompt="a", max_tokens=1, priority=-1)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == (
            "priority=-1: this server takes all requests alike (priorities: false); leave it out"
        )
