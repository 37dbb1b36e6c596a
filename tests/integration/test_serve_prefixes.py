"""Over HTTP: what was copied of a prompt, and why nothing can be."""

import httpx
import pytest

from tests.helpers.http_server import events, post, running

PROMPT = list(range(5, 30))


@pytest.fixture(scope="module")
def url():
    with running("rcmha", prefix_cell=8, max_num_seqs=4, max_batched_tokens=16) as (found, _):
        yield found


def metrics(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.partition(" ") for line in lines if not line.startswith("#"))
    }


def test_usage_and_metrics_say_what_was_copied(url):
    before = metrics(url)
    first, second = (post(url, prompt=PROMPT, max_tokens=3, ignore_eos=True).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 24}
    assert second["usage"]["attnzoo"]["not_cached"] is None
    after = metrics(url)
    grown = {what: after[f"attnzoo_prefix_cache_{what}_total"] - before[f"attnzoo_prefix_cache_{what}_total"]
             for what in ("queries", "hits", "evictions")}  # fmt: skip
    assert grown == {"queries": 50, "hits": 24, "evictions": 0}
    assert after["attnzoo_prefix_cache_bytes"] > before["attnzoo_prefix_cache_bytes"]


def test_a_stream_says_it_too(url):
    options = {"max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    found = [events(post(url, prompt=PROMPT[::-1], **options).text)[-1]["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in found] == [0, 24]


def test_a_reason_is_given(url):
    cache = {"policy": "d2o", "max_tokens": 9, "prefill": "stream"}
    usage = post(url, prompt=PROMPT, max_tokens=2, cache=cache).json()["usage"]
    assert "compresses a prompt while it is read" in usage["attnzoo"]["not_cached"]
