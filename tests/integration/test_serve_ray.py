"""The real server: `python -m serve` with Ray Serve, started once for all tests of this module."""

import signal
import stat
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest

from attnzoo.checkpoint.frozen import FrozenLM
from tests.helpers import clinical_models, diffusion_models, picture_models
from tests.helpers.clinical_files import fhir_bundle, fhir_observation, fhir_stays
from tests.helpers.http_server import events
from tests.helpers.ray_server import ROOT, Running, environment, expected
from tests.helpers.serving import export

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own deprecations

    from serve.deployment import free_port

COHORT = clinical_models.icu_cohort()


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """A model of pictures in front of what is served."""
    lm = export(tmp_path_factory.mktemp("same") / "tiny" / "export", max_len=1024)
    return picture_models.in_front_of(FrozenLM.load(str(lm)))


@pytest.fixture(scope="module")
def server(tmp_path_factory, looks):
    clinical = clinical_models.export(tmp_path_factory.mktemp("clinical"), clinical_models.small_trained(COHORT))
    pictures = picture_models.export(tmp_path_factory.mktemp("pictures"), looks)
    diffusion = diffusion_models.export(tmp_path_factory.mktemp("drawing"), diffusion_models.small_diffusion())
    own = ("max_num_seqs=2", "max_queue=2", "drain_timeout_s=120", f"clinical={clinical.parent}", "clinical_name=risk")
    beside = (f"pictures={pictures}", f"diffusion={diffusion}", "diffusion_name=painter")
    running = Running(tmp_path_factory.mktemp("server"), *own, *beside)
    yield running
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait(10)


def test_two_streams_one_cancelled(server):
    def complete(prompt: str) -> str:
        stream = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(complete, "One")
        cancelled = server.client.completions.create(
            model="tiny", prompt="Two", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        for _, _chunk in zip(range(3), cancelled, strict=False):
            pass
        cancelled.close()
        assert whole.result(60) == expected("One", 200)
    for _ in range(200):
        if server.metric("num_requests_running") == 0:
            break
        time.sleep(0.02)
    assert server.metric('request_success_total{finished_reason="abort"}') == 1
    assert server.metric("generation_tokens_total") < 1000
    assert server.metric("kv_bytes") == 0


def test_events_come_beside_ray_and_clients_see_nothing_of_it(server):
    body = {"model": "tiny", "prompt": "One", "max_tokens": 5, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-attnzoo-relay": "f" * 32 + " 0"})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert not [name for name in answer.headers if "relay" in name]
    sockets = [each.laddr for process in server.family() for each in process.net_connections(kind="unix")]
    lines = [path for path in sockets if "attnzoo-relay-" in path]
    assert len(set(lines)) == 1, "one proxy"
    assert len(lines) == 2, "where it listens, and the replica's line"


def test_the_servers_processes_wait_no_longer_than_others_and_say_what_they_compute_with(server):
    """Ray would run them at nice 15."""
    assert {process.nice() for process in server.family()} == {psutil.Process().nice()}
    card = httpx.get(f"{server.url}/v1/models/tiny").json()
    assert (card["dtype"], card["prompt_dtype"], card["threads"]) == ("float32", "float32", 1)


def test_answers_and_refusals_go_through_unchanged(server):
    answer = server.client.completions.create(model="tiny", prompt="Hello", max_tokens=30, temperature=0)
    assert answer.choices[0].text == expected("Hello", 30)
    assert answer.usage.model_extra["attnzoo"]["kv_bytes"] > 0
    assert [model.id for model in server.client.models.list()] == ["tiny", "risk", "painter"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    for method, path, status in [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)]:
        response = httpx.request(method, server.url + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError, match="suffix"):
        server.client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match=r"cache\.policy='d20' is not known; did you mean 'd2o'"):
        server.client.completions.create(model="tiny", prompt="a", extra_body={"cache": {"policy": "d20"}})


def test_a_clinical_model_beside_the_language_model(server):
    """Predictions go through Ray and its proxy unchanged, whole, as FHIR, and hour by hour."""
    body = clinical_models.request_of(COHORT, [0, 1], model="risk", hourly=True)
    told = httpx.post(f"{server.url}/v1/predict", json=body, timeout=60).json()["patients"]
    expected = clinical_models.small_trained(COHORT, judged=0).predict(COHORT, np.array([0, 1]))
    assert [one["probability"] for one in told] == pytest.approx(list(expected), abs=1e-6)
    one = {**body, "patients": body["patients"][:1], "stream": True}
    *hours, last = events(httpx.post(f"{server.url}/v1/predict", json=one, timeout=60).text)
    assert [hour["probability"] for hour in hours] == pytest.approx(
        [hour["probability"] for hour in told[0]["by_hour"]], abs=1e-6
    )
    assert last["patients"][0]["probability"] == pytest.approx(expected[0], abs=1e-6)
    fhir = {"content-type": "application/fhir+json", "accept": "application/fhir+json"}
    bundle = fhir_bundle([*fhir_stays(), fhir_observation("hr", 2, "8867-4", 92, "/min")])
    answer = httpx.post(f"{server.url}/v1/predict", json=bundle, headers=fhir, timeout=60)
    assert [entry["resource"]["resourceType"] for entry in answer.json()["entry"]] == ["RiskAssessment"] * 2
    assert httpx.post(f"{server.url}/v1/predict", json={}, timeout=60).json()["error"]["param"] == "model"
    assert server.metric("predict_time_seconds_count") == 4


def test_pictures_are_seen_drawn_and_composed(server, looks):
    """Through Ray and its proxy unchanged."""
    picture, asked = picture_models.some_picture(2), "how many objects are there?"
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    message = picture_models.message(picture_models.image_part(picture), asked)
    told = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "messages": [message]}, timeout=60).json()
    assert told["choices"][0]["message"]["content"] == looks.answers(picture[None], asked)[0]
    painter = diffusion_models.small_diffusion()
    wanted = {**diffusion_models.GENERATE, "model": "painter", "seed": 5}
    drawn = httpx.post(f"{server.url}/v1/images/generations", json=wanted, timeout=60).json()["data"][0]["b64_json"]
    alone = diffusion_models.drawn(painter.draw([wanted["prompt"]], [5], steps=2))
    assert np.array_equal(diffusion_models.pixels_of(drawn), alone)
    request = {**diffusion_models.composition(), "model": "painter"}
    whole = httpx.post(f"{server.url}/v1/images/compose", json=request, timeout=60).json()
    *steps, last = events(
        httpx.post(f"{server.url}/v1/images/compose", json={**request, "stream": True}, timeout=60).text
    )
    assert steps
    assert last["data"][0]["b64_json"] == whole["data"][0]["b64_json"]
    refused = httpx.post(f"{server.url}/v1/images/compose", json={**request, "seed": 3}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")


def test_a_request_with_a_compressed_cache_takes_less_memory(server):
    used, before = {}, server.metric("kv_pool_bytes")
    for policy in ({"policy": "full"}, {"policy": "d2o", "max_tokens": 20}):
        body = {"model": "tiny", "prompt": list(range(5, 205)), "max_tokens": 8, "ignore_eos": True, "cache": policy}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        used[policy["policy"]] = answer["usage"]["attnzoo"]["kv_bytes"]
    assert used["d2o"] < used["full"] / 4
    assert server.metric("kv_pool_bytes") == before > 0


def test_overload_is_refused_in_openai_shape(server):
    def one(_: int) -> int:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 300, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
        assert answer.headers.get("retry-after") == ("1" if answer.status_code == 429 else None)
        return answer.status_code

    with ThreadPoolExecutor(8) as pool:
        codes = sorted(pool.map(one, range(8)))
    assert codes[:4] == [200] * 4
    assert codes[-1] == 429


def test_only_loopback_listens_and_the_token_is_private(server):
    addresses = {
        connection.laddr.ip
        for process in server.family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    token = server.directory / "home" / "ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_sigterm_to_all_processes_finishes_what_runs_and_leaves_nothing(server):
    """As systemd sends it, and `timeout` to a process group. The last test: it ends the server."""
    family = server.family()
    assert len(family) > 3
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "stream": True}
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=120)
        while server.metric("num_requests_running") == 0:
            assert not answer.done()
        for process in reversed(family):  # the command last: Ray must not be gone before it
            process.send_signal(signal.SIGTERM)
        last, done = answer.result(120).text.strip().split("\n\n")[-2:]
        assert '"finish_reason":"length"' in last
        assert done == "data: [DONE]"
    assert server.process.wait(60) == 0
    assert not [process for process in family if process.is_running()]
    assert "Hi" not in "".join(server.errors)
    assert "Traceback" not in "".join(server.errors)


def test_sigterm_at_the_first_sign_of_health_ends_cleanly(tmp_path):
    """Clients see the server before its command has printed the URL; a signal then must not meet Ray's own handler."""
    checkpoint = export(tmp_path / "tiny" / "export", max_len=64)
    port = free_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while not healthy(port):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait(10)


def healthy(port: int) -> bool:
    """Asked hundreds of times: a client of httpx would prepare for TLS each time, and use more time than Ray."""
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


@pytest.mark.slow
def test_serve_run(tmp_path):
    """Ray's own command line finds the application by its import path, from the repository's root."""
    checkpoint = export(tmp_path / "tiny" / "export", max_len=1024)
    port = free_port("127.0.0.1", 0)
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"""
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
- name: attnzoo
  route_prefix: /
  import_path: attnzoo.apps:server
  args: {{checkpoint: {checkpoint}, max_num_seqs: 2}}
"""
    )
    command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
    alone = {name: value for name, value in environment().items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=ROOT, env={**alone, "HOME": str(tmp_path)})
    family = []
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None
            time.sleep(0.1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=30, temperature=0)
        assert answer.choices[0].text == expected("Hello", 30)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
