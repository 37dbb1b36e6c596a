"""Pictures over HTTP: a model of pictures answers what its Python class answers, and the server fetches nothing."""

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jsonschema
import numpy as np
import pytest
import torch

from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.vision.trained_pictures import TrainedPictures, load_pictures
from attnzoo.vision.turns import TurnFormat
from serve.__main__ import check_checkpoint
from serve.async_engine import AsyncEngine
from serve.config import EngineConfig, ServeConfig, absolute_paths, build_serve_config
from serve.engine import Engine
from serve.loading import load_parts
from serve.modalities.images import fitted
from serve.openai.chat import ChatAnswer
from tests.helpers import picture_models, sensor_models, serving
from tests.helpers.http_server import events, running_engine
from tests.helpers.picture_models import file_of, image_part, message, picture_model, some_picture, url_of

NAME, ASKED = "looker", "how many objects are there?"
WHERE = "messages[0].content[0].image_url"
Server = tuple[str, AsyncEngine]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a model with its own language model."""
    return picture_models.export(tmp_path_factory.mktemp("pictures") / NAME, picture_model())


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedPictures:
    return load_pictures(run)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    given = {"checkpoint": str(run), "max_num_seqs": 4, "max_batched_tokens": 24, "attention": "edit"}
    config = build_serve_config(absolute_paths({**given, "max_image_bytes": 9000, "max_image_pixels": 90_000}))
    with running_engine(Engine(config), config) as found:
        yield found


@pytest.fixture
def url(server: Server) -> str:
    return server[0]


def post(url: str, *messages: dict, **fields: object) -> httpx.Response:
    body = {"model": NAME, "messages": list(messages), "temperature": 0, "max_tokens": 8, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_the_answer_is_that_of_the_trained_model(url: str, trained: TrainedPictures) -> None:
    pictures = np.stack([some_picture(seed) for seed in range(4)])
    wanted = trained.answers(pictures, ASKED)
    assert len(set(wanted)) > 1, "the pictures do not matter"
    with ThreadPoolExecutor(4) as threads:  # beside one another
        found = list(threads.map(lambda picture: text_of(post(url, message(image_part(picture), ASKED))), pictures))
    assert found == wanted
    for picture, text in zip(pictures[:2], wanted[:2], strict=True):
        assert text_of(post(url, message(image_part(picture, "webp"), ASKED))) == text
        assert text_of(post(url, message(ASKED, image_part(picture)))) == text, "the order of the parts matters"
        chunks = events(post(url, message(image_part(picture), ASKED), stream=True).text)
        assert "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks) == text
    usage = post(url, message(image_part(pictures[0]), ASKED)).json()["usage"]
    assert usage["prompt_tokens"] == len(trained.prompt(pictures[0], ASKED))
    part = image_part(pictures[0])
    part["image_url"]["detail"] = "auto"
    assert text_of(post(url, message(part, ASKED))) == wanted[0]


def test_turns_are_those_of_training(server: Server, trained: TrainedPictures) -> None:
    words = server[1].engine
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "b? <s></s>"},
    ]
    encode = trained.language_model.tokenizer.encode
    assert words.encode_chat(turns) == [*encode("", bos=True), *encode("Q: a? A: yes\nQ: b? <s></s> A:")]
    assert set(encode("\n")[:1]) < words.tokenizer.stop_ids
    for wrong, said in (
        ([{"role": "system", "content": "Be brief."}, *turns], "of the roles user and assistant in turn"),
        (turns[:2], "the last message must be of the role user"),
    ):
        error = post(server[0], *wrong).json()["error"]
        assert (error["code"], error["param"]) == ("chat_template_error", "messages")
        assert said in error["message"]


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["An", "swer: ", "yes"], "yes"),
        (["Answer: yes", " it is"], "yes it is"),
        (["Ans"], "Ans"),
        (["An", " apple"], "An apple"),
        (["", "Answer: Answer: "], "Answer: "),
    ],
)
def test_what_stands_before_an_answer_is_no_part_of_it_in_streams_too(pieces: list[str], shown: str) -> None:
    answer = object.__new__(ChatAnswer)
    answer.lead, answer.held = "Answer: ", {}
    last = len(pieces) - 1
    assert "".join(answer._led(0, text, number == last) for number, text in enumerate(pieces)) == shown
    assert "".join(pieces).removeprefix(answer.lead) == shown


@pytest.mark.parametrize(
    ("value", "place", "said"),
    [
        (None, "", "must be"),
        ("data:image/png;base64,AAAA", "", "must be"),
        ({}, ".url", "is missing"),
        ({"url": 5}, ".url", "=5 must be a valid string"),
        ({"uri": "x"}, ".uri", "unknown field.*did you mean 'url'"),
        ({"url": "x", "detail": "high"}, ".detail", "='?\"?high"),
        ({"url": "https://example.com/a.png"}, ".url", "nothing is fetched"),
        ({"url": url_of(file_of(some_picture(), "jpeg"), "png")}, ".url", "cannot be decoded as image/png"),
        ({"url": url_of(file_of(some_picture())[:90])}, ".url", "damaged, or cut"),
        ({"url": url_of(file_of(np.zeros((2, 99, 3), np.uint8)))}, ".url", "99 x 2 pixels, and its shorter side"),
        ({"url": url_of(bytes(9001))}, ".url", "has about 9003 bytes; at most 9000 are taken"),
        ({"url": url_of(file_of(np.zeros((301, 300, 3), np.uint8)))}, ".url", "300 x 301 pixels; at most 90000 pixels"),
    ],
)
def test_a_wrong_picture_is_refused_by_field(url: str, value: object, place: str, said: str) -> None:
    answer = post(url, message({"type": "image_url", "image_url": value}, ASKED))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, WHERE + place, "invalid_request_error")
    assert re.search(said, error["message"]), error["message"]
    assert WHERE + place in error["message"]
    assert len(error["message"]) < 400


def test_pictures_in_other_places_and_for_other_models_are_refused(url: str, run: Path, tmp_path: Path) -> None:
    part, answered = image_part(some_picture()), {"role": "assistant", "content": "yes"}
    for messages, name, said in (
        ([message(part, part, ASKED)], "messages[0].content[1]", "this server takes 1; send fewer"),
        ([message("a"), answered, message(part, ASKED)], "messages[2].content[0]", "begin a conversation with it"),
        ([{**message(part), "role": "assistant"}], "messages[0].content", "only messages of the role user may"),
        ([message({**part, "text": "a"})], "messages[0].content[0]", "and nothing else"),
    ):
        answer = post(url, *messages)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name), error
        assert said in error["message"]
    config = ServeConfig(checkpoint=str(sensor_models.language_model(tmp_path / NAME)))
    with running_engine(Engine(config), config) as (other, _):
        error = post(other, message(part)).json()["error"]
        assert (error["param"], error["code"]) == ("messages[0].content[0]", "unsupported")
        assert "which this server's model does not take: it was not trained on pictures" in error["message"]


def test_other_sizes_fit_into_the_square_on_grey() -> None:
    whole = torch.from_numpy(some_picture()).permute(2, 0, 1)
    assert torch.equal(fitted(whole, 32), whole)
    wide = fitted(torch.from_numpy(some_picture(width=64, height=32)).permute(2, 0, 1), 32)
    assert wide.shape == (3, 32, 32)
    assert bool((wide[:, :7] == 127).all())
    assert bool((wide[:, -7:] == 127).all())
    assert float(wide[:, 16].float().std()) > 1
    assert fitted(torch.zeros(3, 500, 20, dtype=torch.uint8), 32).shape == (3, 32, 32)


def test_no_log_holds_a_picture(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, owner = server
    data = file_of(some_picture(5))
    part = image_part(url_of(data))
    secret = part["image_url"]["url"][40:80]

    def broken(content: object) -> None:
        raise RuntimeError(str(part))

    with caplog.at_level(logging.DEBUG):
        assert post(url, message(part, ASKED)).status_code == 200
        assert post(url, message(image_part(url_of(data[:-20])), ASKED)).status_code == 400
        assert post(url, message(part, part, ASKED)).status_code == 400
        with monkeypatch.context() as patched:
            patched.setattr(owner.engine.modalities["image_url"], "encode", broken)
            assert post(url, message(part, ASKED)).status_code == 500
    assert "failed" in caplog.text
    assert secret not in caplog.text
    assert owner.engine.scheduler.num_running == 0


def test_the_models_card_and_the_document_say_what_a_picture_may_be(url: str) -> None:
    card = httpx.get(f"{url}/v1/models/{NAME}").json()
    assert card["content"]["image_url"] == {
        "formats": ["png", "jpeg", "webp"],
        "size": 32,
        "embeddings": 16,
        "max_images": 1,
        "max_bytes": 9000,
        "max_pixels": 90_000,
    }
    document = httpx.get(f"{url}/openapi.json").json()
    components = {"components": document["components"]}
    jsonschema.validate(card, {"$ref": "#/components/schemas/ModelCard", **components})
    request = {"$ref": "#/components/schemas/ChatRequest", **components}
    jsonschema.validate({"model": NAME, "messages": [message(image_part(some_picture()))]}, request)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": NAME, "messages": [message({"type": "image_url", "image_url": {}})]}, request)


def test_a_model_in_front_of_a_frozen_one_is_served_with_it(run: Path, tmp_path: Path) -> None:
    lm = sensor_models.language_model(tmp_path / "lm", "mha")
    texts = TurnFormat(before="user: ", ask="{question} assistant: ", reply="{answer}\n")
    frozen = FrozenLM.load(str(lm))
    made = picture_models.export(tmp_path / NAME, picture_models.in_front_of(frozen, texts=texts))
    settings = absolute_paths({"checkpoint": str(made)})
    assert settings == {"checkpoint": str(lm), "pictures": str(made / "export"), "model_name": NAME}
    check_checkpoint(build_serve_config({**settings, "port": 0}))
    parts = load_parts(EngineConfig(checkpoint=str(made)), None, None)
    assert list(parts.modalities) == ["image_url"]
    assert list(load_parts(EngineConfig(checkpoint=str(lm), pictures=str(made)), None, None).modalities) == [
        "image_url"
    ]
    own = absolute_paths({"checkpoint": str(run)})
    assert own == {"checkpoint": str(run / "export")}
    assert build_serve_config(own).served_name == NAME
    other = sensor_models.language_model(tmp_path / "other", "rcmha")
    sensors = sensor_models.export(tmp_path / "sensors", lm)
    plain = serving.export(tmp_path / "plain")
    for given, said in (
        ({"checkpoint": str(other), "pictures": str(made)}, "was trained with another language model than"),
        ({"checkpoint": str(made), "pictures": str(made)}, "is a model of pictures, and so is pictures="),
        ({"checkpoint": str(run), "sensors": str(sensors)}, "is a model of pictures, and so is sensors="),
        ({"checkpoint": str(lm), "pictures": str(made), "sensors": str(sensors)}, "one server has one of them"),
        ({"checkpoint": str(lm), "pictures": str(made), "dtype": "bfloat16"}, "language model in float32; leave dtype"),
        ({"checkpoint": str(lm), "pictures": str(plain)}, "^pictures=.* holds no model of pictures; give the run or"),
        ({"checkpoint": str(lm), "pictures": str(run)}, "has its own language model; give it as checkpoint"),
        ({"checkpoint": str(run), "max_images": 17}, "max_images=17 must be between 1 and 16"),
        ({"checkpoint": str(run), "max_image_pixels": 0}, "max_image_pixels=0 must be between"),
    ):
        with pytest.raises(ValueError, match=said):
            load_parts(EngineConfig(**given), None, None)
