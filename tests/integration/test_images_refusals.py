"""What POST /v1/images/* refuses: by name, with a way out, before anything is drawn or decoded."""

import base64
import copy
import json
import random
import re
import struct
import zlib

import numpy as np
import pytest

from attnzoo.checkpoint import existing_checkpoint
from serve.clinical.loading import clinical_sources
from serve.config import ServeConfig
from serve.drawing import studio as studio_module
from serve.drawing.loading import check_diffusion, diffusion_source, load_studio
from serve.kinds import is_language
from serve.openai.routes import build_app
from tests.helpers.diffusion_models import (
    GENERATE,
    PATHS,
    ask,
    backdrop,
    composition,
    data_url,
    drawing_client,
    export,
    small_diffusion,
    thing,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return export(tmp_path_factory.mktemp("refusals"), small_diffusion())


@pytest.fixture(scope="module")
def client(checkpoint):
    limits = {"max_drawn": 3, "max_draw_steps": 30, "max_draw_pixels": 10_000}
    with drawing_client(checkpoint, **limits) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def nothing_drawn(client):
    """Every refusal comes before the model is called, but for what is asked for in vain."""
    calls = []
    hook = client.app.state.studio.artist.trained.model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def claims(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


WRONG = [
    ({"prompt": None}, "prompt", "must be"),
    ({"prompt": 5}, "prompt", "must be"),
    ({"prompt": ["an apple"]}, "prompt", "must be"),
    ({"prompt": "a" * 513}, "prompt", "at most 512"),
    ({"prompt": "an aple"}, "prompt", "did you mean 'apple'?"),
    ({"prompt": "An apple"}, "prompt", "'An'"),
    ({"prompt": "a " * 17}, "prompt", "17 words"),
    ({"prompt": "</script><img>"}, "prompt", "has not learned"),
    ({"model": None}, "model", "must be"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 4}, "n", "max_drawn"),
    ({"n": 10**30}, "n", "64 bits"),
    ({"n": True}, "n", "must be"),
    ({"steps": 0}, "steps", "greater than or equal to 1"),
    ({"steps": 31}, "steps", "max_draw_steps"),
    ({"steps": "2"}, "steps", "must be"),
    ({"steps": 2.5}, "steps", "must be"),
    ({"size": "1024x1024"}, "size", "16x16"),
    ({"size": "x" * 500}, "size", "16x16"),
    ({"response_format": "url"}, "response_format", "b64_json"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**63}, "seed", "64 bits"),
    ({"seed": "x"}, "seed", "must be"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "no number"),
    ({"guidance_scale": 101}, "guidance_scale", "less than or equal to 100"),
    ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
    ({"negative_prompt": "a dog"}, "negative_prompt", "not supported"),
    ({"quality": "hd"}, "quality", "not supported"),
    ({"style": "vivid"}, "style", "not supported"),
    ({"background": "transparent"}, "background", "not supported"),
    ({"output_format": "webp"}, "output_format", "not supported"),
    ({"partial_images": 2}, "partial_images", "not supported"),
    ({"stream": "yes"}, "stream", "must be"),
    ({"preview_every": 2}, "preview_every", "stream=true"),
    ({"stream": True, "preview_every": 0}, "preview_every", "greater than or equal to 1"),
    ({"guidance": 2}, "guidance", "did you mean 'guidance_scale'"),
    ({"infused": 0.5}, "infused", "unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=lambda each: str(each)[:40])
def test_a_wrong_field_of_a_drawing_is_named(client, nothing_drawn, fields, param, words):
    answer = client.post(
        PATHS["draw"], content=json.dumps({**GENERATE, **fields}), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error
    assert len(error["message"]) < 500
    assert not nothing_drawn


REGION = {"left": 3, "top": 5}
HOLLOW = thing()
HOLLOW[..., 3] = 100
WRONG_COMPOSITIONS = [
    ({"background": None}, "background", "must be"),
    ({"background": "http://127.0.0.1:1/a.png"}, "background", "nothing is fetched"),
    ({"background": "file:///etc/passwd"}, "background", "nothing is fetched"),
    ({"background": data_url(backdrop(17))}, "background", "17 x 17 pixels, and this model's pictures have 16 x 16"),
    ({"background": data_url(backdrop()[:8].copy())}, "background", "16 x 8 pixels"),
    ({"background": claims(60_000, 60_000)}, "background", "cannot be decoded"),
    ({"background": claims(101, 100)}, "background", "at most 10000"),
    ({"background": claims(16, 16)}, "background", "cannot be decoded"),
    ({"background": "data:image/svg+xml;base64,PHN2Zy8+"}, "background", "media type"),
    ({"background": data_url(backdrop())[:-9]}, "background", "base64"),
    ({"object": ""}, "object", "nothing is fetched"),
    ({"object": {"url": data_url(thing())}}, "object", "must be"),
    ({"object": claims(5_000, 1)}, "object", "4096 a side"),
    ({"object": data_url(thing(1, 1100))}, "region", "region.width"),
    ({"object": data_url(HOLLOW)}, "region", "transparent"),
    ({"region": None}, "region", "must be"),
    ({"region": [1, 2, 3, 4]}, "region", "must be"),
    ({"region": {"left": 3}}, "region.top", "missing"),
    ({"region": {**REGION, "x": 3}}, "region.x", "unknown field"),
    ({"region": {**REGION, "left": 1.5}}, "region.left", "must be"),
    ({"region": {**REGION, "left": 10**9}}, "region.left", "less than or equal to 4096"),
    ({"region": {**REGION, "width": 5}}, "region", "one of width and height"),
    ({"region": {**REGION, "width": 0, "height": 5}}, "region.width", "greater than or equal to 1"),
    ({"region": {**REGION, "width": 1025, "height": 5}}, "region.width", "less than or equal to 1024"),
    ({"region": {"left": 16, "top": 0}}, "region", "is not in the picture"),
    ({"region": {"left": 0, "top": -6}}, "region", "is not in the picture"),
    ({"region": {"left": 0, "top": 15}}, "region", "is not in the picture"),  # its first row is transparent
    ({"object_words": ""}, "object_words", "at least 1"),
    ({"object_words": " "}, "object_words", "stands 0 times"),
    ({"object_words": "a cat"}, "object_words", "stands 0 times"),
    ({"object_words": "a"}, "object_words", "stands 4 times"),
    ({"background_prompt": "a picture"}, "background_prompt", "'picture'"),
    ({"prompt": "dog"}, "object_words", "stands 0 times"),
    ({"infused": 1.1}, "infused", "less than or equal to 1"),
    ({"kept": -0.1}, "kept", "greater than or equal to 0"),
    ({"pasted": "0.2"}, "pasted", "must be"),
    ({"confined": 1}, "confined", "must be"),
    ({"steps": 31}, "steps", "max_draw_steps"),
    ({"seed": 7}, "seed", "nothing at random"),
    ({"n": 2}, "n", "not supported"),
    ({"mask": data_url(thing())}, "mask", "not supported"),
    ({"preview_every": 1}, "preview_every", "stream=true"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), WRONG_COMPOSITIONS, ids=lambda each: str(each)[:40])
def test_a_wrong_field_of_a_composition_is_named(client, nothing_drawn, fields, param, words):
    error = ask(client, "compose", composition(**fields), status=400)
    assert (error["param"], words in error["message"]) == (param, True), error
    assert len(error["message"]) < 500
    assert not nothing_drawn


@pytest.mark.parametrize("kind", PATHS)
def test_bodies_that_are_no_requests(client, kind):
    def refused(body, status=400, **headers):
        sent = client.post(PATHS[kind], content=body, headers={"content-type": "application/json", **headers})
        assert sent.status_code == status, sent.text
        return sent.json()["error"]

    for body in (b"", b"[]", b"{", b"\xff", b'{"model": "tiny", "model": "tiny"}', b"[" * 5000):
        assert refused(body)["code"] == "invalid_json"
    assert "is missing" in refused(b'{"model": "tiny"}')["message"]
    refused(b"{}", 415, **{"content-type": "multipart/form-data"})
    refused(b" " * (1 << 20) + b"{}", 413)
    refused(b"{}", 403, host="evil.example")
    assert client.get(PATHS[kind]).status_code == 405
    assert client.post(PATHS[kind] + "/x", json={}).status_code == 404


JUNK = [
    None,
    True,
    -1,
    0,
    1e308,
    10**18,
    "",
    "x" * 2000,
    "\x00",
    "ä😀",
    [],
    {},
    [[]],
    {"url": "x"},
    "data:image/png;base64,",
]


def test_any_part_of_a_request_may_be_junk(client):
    """It ends in an answer or in a refusal, never in an error of the server."""
    draw, statuses = random.Random(3), set()
    for number in range(120):
        kind = "draw" if number % 2 else "compose"
        body = copy.deepcopy(
            {**GENERATE, "n": 1, "seed": 1, "steps": 1} if number % 2 else composition(steps=1, infused=0.0)
        )
        node = body["region"] if kind == "compose" and draw.random() < 0.3 else body
        node[draw.choice(list(node))] = draw.choice(JUNK)
        answer = client.post(PATHS[kind], json=body)
        assert answer.status_code in (200, 400, 404), body
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert statuses >= {200, 400}


def test_a_model_that_cannot_compose_draws(checkpoint, monkeypatch):
    """Of the zoo none is such; a plug-in's attention may have no context."""

    def no_context(trained):
        raise ValueError("model.attention='own' attends to no other picture (no context)")

    monkeypatch.setattr(studio_module, "check_model", no_context)
    with drawing_client(checkpoint) as client:
        assert client.get("/v1/models").json()["data"][0]["composes"] is False
        assert "no context" in ask(client, "compose", composition(), status=400)["message"]
        ask(client, "draw", GENERATE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint": "{own}", "diffusion": "{own}"}, "diffusion="),
        ({"checkpoint": "{own}", "diffusion_name": "x"}, "diffusion_name='x' has no effect"),
        ({"checkpoint": "{own}", "max_num_seqs": 4}, "max_num_seqs=4 has no effect: "),
        ({"checkpoint": "{own}", "attention": "read"}, "attention='read' has no effect"),
        ({"checkpoint": "{own}", "device": "meta"}, "device='meta' has no effect"),
        ({"checkpoint": "{own}", "max_patients": 2}, "this server has no clinical model (setting clinical)"),
        ({"checkpoint": "none", "max_drawn": 2}, "this server has no diffusion model (setting diffusion)"),
        ({"checkpoint": "none", "draw_timeout_s": 2.0}, "this server has no diffusion model (setting diffusion)"),
        ({"checkpoint": "none", "diffusion": "nowhere"}, "diffusion='nowhere' holds no diffusion model; give the run"),
        ({"checkpoint": "tiny", "diffusion": "{own}"}, "two models are called 'tiny'; set diffusion_name"),
        ({"checkpoint": "none", "max_draw_steps": 0}, "max_draw_steps=0 must be at least 1"),
        ({"checkpoint": "none", "draw_timeout_s": 0.0}, "draw_timeout_s=0.0 must be positive"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(checkpoint, settings, words):
    given = {key: str(checkpoint) if value == "{own}" else value for key, value in settings.items()}
    with pytest.raises(ValueError, match=re.escape(words)):
        (lambda config: (diffusion_source(config), clinical_sources(config)))(ServeConfig(**given))


def test_a_diffusion_model_stands_alone_or_beside_another(checkpoint, tmp_path):
    assert existing_checkpoint(str(checkpoint)) == checkpoint / "export"
    assert not is_language(str(checkpoint))
    config = ServeConfig(checkpoint="none", diffusion=str(checkpoint), diffusion_name="painter")
    assert load_studio(config).artist.name == "painter"
    assert "/v1/images/generations" in build_app(None, config, studio=load_studio(config)).openapi()["paths"]
    other = export(tmp_path, small_diffusion())
    (other / "export" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        check_diffusion(ServeConfig(checkpoint=str(other)))
    with pytest.raises(ValueError, match=r"model\.channels=1 cannot be sent as pictures"):
        check_diffusion(ServeConfig(checkpoint=str(export(tmp_path / "grey", small_diffusion(channels=1)))))


def test_a_background_may_be_transparent_and_an_object_opaque(client):
    """The background is laid on white; an object without transparency fills its box."""
    clear = np.concatenate([backdrop(), np.zeros((16, 16, 1), np.uint8)], 2)
    white = ask(client, "compose", composition(background=data_url(clear), steps=1))
    assert (
        white["data"] == ask(client, "compose", composition(background=data_url(backdrop() * 0 + 255), steps=1))["data"]
    )
    full = thing()
    full[..., 3] = 255
    opaque = ask(client, "compose", composition(object=data_url(full[..., :3].copy()), steps=1))
    assert opaque["data"] == ask(client, "compose", composition(object=data_url(full), steps=1))["data"]
