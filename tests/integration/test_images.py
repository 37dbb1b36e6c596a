"""POST /v1/images/*: pictures are the library's, bit for bit, whatever else is drawn; progress, limits, leaving."""

import asyncio
import json
import threading
import time

import httpx
import jsonschema
import numpy as np
import openai
import pytest

from attnzoo.vision.compose import ComposeOptions, Placement, compose
from serve import workplace
from tests.helpers.diffusion_models import (
    GENERATE,
    MODEL,
    PATHS,
    PROMPT,
    SIDE,
    app_of,
    ask,
    backdrop,
    composition,
    data_url,
    drawing_client,
    drawn,
    export,
    pixels_of,
    small_diffusion,
    thing,
)
from tests.helpers.http_server import JSON, connect, events, serving, wait_until


@pytest.fixture(scope="module")
def trained():
    return small_diffusion()


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return export(tmp_path_factory.mktemp("images"), trained)


@pytest.fixture(scope="module")
def client(checkpoint):
    with drawing_client(checkpoint) as client:
        yield client


def described(client, value, schema):
    """Raises for a value that the OpenAPI document does not describe."""
    document = client.get("/openapi.json").json()
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def placement(left=3, top=5, own=None):
    captions = ("a sketch of a car on a blue plain background", PROMPT, "a dog")
    return Placement(backdrop(), thing() if own is None else own, left, top, *captions)


def test_pictures_are_those_of_the_library(client, trained):
    """With defaults and with options; each picture of several is the one that its seed draws alone."""
    described(client, {**GENERATE, "n": 3, "seed": 5}, "ImageRequest")
    found = ask(client, "draw", {**GENERATE, "n": 3, "seed": 5})
    described(client, found, "ImageList")
    assert [each["seed"] for each in found["data"]] == [5, 6, 7]
    assert (found["size"], found["model"], found["forwards"]) == (f"{SIDE}x{SIDE}", MODEL, 6)
    assert abs(found["created"] - time.time()) < 60
    pictures = [pixels_of(each["b64_json"]) for each in found["data"]]
    for seed, picture in zip((5, 6, 7), pictures, strict=True):
        assert np.array_equal(picture, drawn(trained.draw([GENERATE["prompt"]], [seed], steps=2)))
    assert not np.array_equal(pictures[0], pictures[1])
    options = {"steps": 3, "guidance_scale": 1.5, "size": "16x16", "response_format": "b64_json", "user": "x"}
    (one,) = ask(client, "draw", {**GENERATE, **options, "seed": 6})["data"]
    assert np.array_equal(
        pixels_of(one["b64_json"]), drawn(trained.draw([GENERATE["prompt"]], [6], steps=3, guidance=1.5))
    )
    (again,) = ask(client, "draw", {**GENERATE, "seed": 6})["data"]
    assert again == found["data"][1]


def test_without_a_seed_there_is_one_that_draws_it_again(client):
    one, other = (ask(client, "draw", GENERATE)["data"][0] for _ in range(2))
    assert one["seed"] != other["seed"]
    assert ask(client, "draw", {**GENERATE, "seed": one["seed"]})["data"] == [one]


def test_neutral_fields_of_other_clients_change_nothing(client):
    body = {**GENERATE, "seed": 1}
    neutral = {"quality": "auto", "output_format": "png", "style": None, "negative_prompt": "", "partial_images": 0}
    assert ask(client, "draw", {**body, **neutral})["data"] == ask(client, "draw", body)["data"]


@pytest.mark.parametrize(("left", "top"), [(3, 5), (-4, 13)])
def test_compositions_are_those_of_the_library(client, trained, left, top):
    """Inside and over the border, with defaults and with every option."""
    described(client, composition(), "ComposeRequest")
    found = ask(client, "compose", composition(region={"left": left, "top": top}))
    described(client, found, "ImageList")
    expected = compose(trained, [placement(left, top)], ComposeOptions(steps=2))
    assert np.array_equal(pixels_of(found["data"][0]["b64_json"]), drawn(expected))
    assert "seed" not in found["data"][0]
    assert found["forwards"] == 2 * 2 + 2 + round(0.3 * 2)
    given = {"steps": 3, "guidance_scale": 1.0, "infused": 1.0, "pasted": 0.0, "kept": 0.4, "confined": False}
    options = ComposeOptions(steps=3, guidance=1.0, infused=1.0, pasted=0.0, kept=0.4, confined=False)
    found = ask(client, "compose", composition(region={"left": left, "top": top}, **given))
    expected = compose(trained, [placement(left, top)], options)
    assert np.array_equal(pixels_of(found["data"][0]["b64_json"]), drawn(expected))
    assert found["forwards"] == 3 * 3 + 3


def test_an_object_is_scaled_to_its_region(client, trained):
    """By areas: the mean of four equal pixels each; in its own size nothing of it changes."""
    small = thing()
    large = small.repeat(3, 0).repeat(3, 1)
    region = {"left": 3, "top": 5, "width": 6, "height": 6}
    same = ask(client, "compose", composition(region=region))["data"]
    assert same == ask(client, "compose", composition())["data"]
    flat = np.full((18, 18, 4), (200, 30, 90, 255), np.uint8)
    scaled = ask(client, "compose", composition(object=data_url(flat), region=region))["data"]
    assert scaled == ask(client, "compose", composition(object=data_url(flat[:6, :6].copy())))["data"]
    other = ask(client, "compose", composition(object=data_url(large), region={**region, "width": 5}))["data"]
    assert other != same


@pytest.mark.parametrize("kind", PATHS)
def test_a_stream_tells_each_step_and_then_everything(client, kind):
    body = {**GENERATE, "seed": 3, "n": 2, "steps": 4} if kind == "draw" else composition(steps=4)
    whole = ask(client, kind, body)
    answer = client.post(PATHS[kind], json={**body, "stream": True, "preview_every": 3})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *steps, last = events(answer.text)
    assert last["data"] == whole["data"]
    described(client, last, "ImageList")
    of = 4 if kind == "draw" else 12
    assert [(each["image"], each["step"]) for each in steps] == [
        (image, step) for image in range(len(whole["data"])) for step in range(1, of + 1)
    ]
    for each in steps:
        described(client, each, "ImageStep")
        assert each["of"] == of
        assert each["part"] == ("inversion" if kind == "compose" and each["step"] <= 8 else "generation")
        assert (each["b64_json"] is not None) == (each["step"] % 3 == 0)
    shown = pixels_of(next(each["b64_json"] for each in steps if each["b64_json"]))
    assert shown.shape == (SIDE, SIDE, 3)
    plain = events(client.post(PATHS[kind], json={**body, "stream": True}).text)
    assert all(each["b64_json"] is None for each in plain[:-1])


def test_requests_at_the_same_time_change_no_bit_of_one_another(checkpoint):
    with serving(app_of(checkpoint), lifespan="auto") as url:
        alone = [ask(httpx.Client(base_url=url), "draw", {**GENERATE, "seed": seed})["data"] for seed in range(6)]

        async def together():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                bodies = [{**GENERATE, "seed": seed} for seed in range(6)]
                drawings = [client.post(PATHS["draw"], json=body) for body in bodies]
                compositions = [client.post(PATHS["compose"], json=composition()) for _ in range(3)]
                return await asyncio.gather(*drawings, *compositions)

        answers = asyncio.run(together())
        assert [each.status_code for each in answers] == [200] * 9
        assert [each.json()["data"] for each in answers[:6]] == alone
        assert len({each.text.partition('"data"')[2] for each in answers[6:]}) == 1


def open_request(url, body):
    """A request to draw on a raw connection, which can be dropped at any time."""
    content = json.dumps(body).encode()
    fields = {"host": "localhost", **JSON, "content-length": str(len(content))}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return connect(url, f"POST {PATHS['draw']} HTTP/1.1\r\n{head}\r\n".encode() + content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_work_between_two_steps(checkpoint, stream):
    app = app_of(checkpoint, max_draw_steps=100_000)
    studio, steps = app.state.studio, []
    forward = studio.artist.trained.model.register_forward_pre_hook(lambda *_: steps.append(1))
    with serving(app, lifespan="auto") as url:
        body = {**GENERATE, "steps": 100_000, "stream": stream}
        connection = open_request(url, body)
        wait_until(lambda: len(steps) > 2, "drawing")
        connection.close()
        wait_until(lambda: studio._running == 0, "the request ended")
        forward.remove()
        studio._pool.submit(lambda: None).result(timeout=5)  # the thread is free
        assert ask(httpx.Client(base_url=url), "draw", GENERATE)["forwards"] == 2


def test_a_client_that_leaves_the_queue_costs_no_step(checkpoint):
    app = app_of(checkpoint, max_draw_steps=100_000)
    studio, steps = app.state.studio, []
    with serving(app, lifespan="auto") as url:
        first = open_request(url, {**GENERATE, "steps": 100_000})
        wait_until(lambda: studio._running == 1, "the first is drawn")
        second = open_request(url, {**GENERATE, "prompt": "a dog", "stream": True})
        assert second.recv(12) == b"HTTP/1.1 200"
        second.close()
        wait_until(lambda: studio._running == 1, "the second has gone")
        draw = studio.artist.trained.draw
        object.__setattr__(studio.artist.trained, "draw", lambda captions, *_, **__: steps.append(captions))
        first.close()
        wait_until(lambda: studio._running == 0, "the first has gone")
        studio._pool.submit(lambda: None).result(timeout=5)
        object.__setattr__(studio.artist.trained, "draw", draw)
        assert steps == []


def test_limits_of_time_and_number(checkpoint, monkeypatch):
    monkeypatch.setenv("IMAGES_KEY", "k")
    with drawing_client(checkpoint, max_drawings=1, api_key_env="IMAGES_KEY") as client:
        assert client.post(PATHS["draw"], json=GENERATE).status_code == 401
        client.headers["authorization"] = "Bearer k"
        studio = client.app.state.studio
        with studio.admitted():
            error = ask(client, "draw", GENERATE, status=429)
            assert (error["code"], "max_drawings" in error["message"]) == ("queue_full", True)
        ask(client, "draw", GENERATE)
        monkeypatch.setattr(workplace.time, "perf_counter", iter(range(0, 100000, 50)).__next__)
        error = ask(client, "compose", composition(steps=50), status=503)
        assert "draw_timeout_s=120" in error["message"]
        streamed = client.post(PATHS["draw"], json={**GENERATE, "steps": 50, "stream": True}).text
        assert json.loads(streamed.split("data: ")[-1])["error"]["code"] == "timeout"
        monkeypatch.undo()
        monkeypatch.setenv("IMAGES_KEY", "k")
        ask(client, "draw", GENERATE)
        assert "attnzoo_draw_time_seconds_count 5.0" in client.get("/metrics").text
        studio.draining = True
        assert ask(client, "draw", GENERATE, status=503)["code"] == "unavailable"
        assert client.get("/health").status_code == 503


def test_a_failure_is_told_to_its_owner_alone(checkpoint, monkeypatch, caplog):
    with drawing_client(checkpoint) as client:
        trained = client.app.state.studio.artist.trained

        def fails(_, captions, *__, **___):
            raise RuntimeError(captions[0])

        monkeypatch.setattr(type(trained), "draw", fails)
        error = ask(client, "draw", GENERATE, status=500)
        assert (error["code"], GENERATE["prompt"] in error["message"]) == ("request_failed", True)
        assert "a drawing failed" in caplog.text
        assert GENERATE["prompt"] not in caplog.text
        monkeypatch.undo()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(trained), "draw", lambda *_, **__: trained.noise([0]) * float("nan"))
            assert "not finite" in ask(client, "draw", GENERATE, status=500)["message"]
        ask(client, "draw", GENERATE)


def test_the_card_says_what_the_model_can(client, trained):
    (card,) = client.get("/v1/models").json()["data"]
    described(client, card, "DiffusionCard")
    assert (card["id"], card["kind"], card["size"], card["composes"]) == (MODEL, "diffusion", "16x16", True)
    assert card["words"] == list(trained.words.words)
    assert client.get(f"/v1/models/{MODEL}").json() == card
    assert ask(client, "draw", {**GENERATE, "model": "other"}, status=404)["code"] == "model_not_found"


def test_a_draining_server_finishes_what_runs(checkpoint):
    app = app_of(checkpoint)
    with serving(app, lifespan="auto") as url:
        found = []
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(url + PATHS["draw"], json={**GENERATE, "steps": 50}, timeout=60))
        )
        asking.start()
        wait_until(lambda: app.state.studio._running, "running")
        assert asyncio.run(app.state.studio.drain(30))
        asking.join(30)
        assert found[0].status_code == 200


def test_openais_client(checkpoint, trained):
    with serving(app_of(checkpoint), lifespan="auto") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        own = {"seed": 4, "steps": 2}
        found = client.images.generate(model=MODEL, prompt=GENERATE["prompt"], n=1, size="auto", extra_body=own)
        expected = drawn(trained.draw([GENERATE["prompt"]], [4], steps=2))
        assert np.array_equal(pixels_of(found.data[0].b64_json), expected)
        with pytest.raises(openai.BadRequestError, match="negative_prompt is not supported"):
            client.images.generate(model=MODEL, prompt="an apple", extra_body={"negative_prompt": "a dog"})
