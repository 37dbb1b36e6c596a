"""PH-LLM over HTTP: sensor data in messages become virtual tokens of an adapter, which the served model reads."""

import json
import logging
import re

import httpx
import jsonschema
import pytest
import torch

from attnzoo.attention.edits import Mass
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.clinical.trained_sensors import load_sensors, save_sensors
from attnzoo.language_model import LanguageModel
from attnzoo.models import Embedded, EmbeddedPrompt, Prompt, PromptedLM, generate
from serve.__main__ import check_checkpoint
from serve.config import EngineConfig, ServeConfig, absolute_paths, build_serve_config
from serve.engine import Engine
from serve.loading import load_parts
from serve.openai import encoding
from tests.helpers import sensor_models, serving
from tests.helpers.http_server import events, running_engine
from tests.helpers.sensor_models import DAYS, SENSORS, TOKENS, VALUES, cohort_of, message, sensor_part

NAME = "phllm"
SECRET = 61.125
"""A value that no log may hold."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory as training leaves it; the language model stands elsewhere."""
    root = tmp_path_factory.mktemp("sensors")
    return sensor_models.export(root / NAME, sensor_models.language_model(root / "lm"))


@pytest.fixture(scope="module")
def server(run):
    config = build_serve_config(
        absolute_paths({"checkpoint": str(run), "max_num_seqs": 4, "max_batched_tokens": 16, "attention": "read"})
    )
    with running_engine(Engine(config), config) as (url, owner):
        yield url, owner


@pytest.fixture(scope="module")
def url(server):
    return server[0]


def post(url, *messages, **fields) -> httpx.Response:
    body = {"model": NAME, "messages": list(messages), "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def virtual_tokens(run, values) -> torch.Tensor:
    """By the steps of training: numbers, standardised, through the adapter, in units of the embeddings."""
    trained = load_sensors(run)
    table = trained.language_model.model.embedding.weight
    with torch.no_grad():
        virtual_NMD = trained.adapter(torch.from_numpy(trained.statistics.standardised(cohort_of(values))))
    return virtual_NMD[0] * table.square().mean().sqrt()


def prompt_of(run, before: str, values, after: str) -> EmbeddedPrompt:
    """What the chat template makes of a user's message with sensor data between two texts."""
    words = load_sensors(run).language_model.tokenizer
    begins = [words.bos_id, *words.encode(f"user: {before}")]
    return EmbeddedPrompt(
        [
            begins,
            Embedded(virtual_tokens(run, values)),
            [*words.encode(after), words.eos_id, *words.encode("\nassistant:")],
        ]
    )


def test_the_answer_is_that_of_the_model_on_the_adapters_tokens(server, run):
    url, owner = server
    wanted_prompt = prompt_of(run, "Tired? Data:", VALUES, " Answer:")
    asked = message("Tired? Data:", sensor_part(), " Answer:")
    found = post(url, asked, max_tokens=12, ignore_eos=True).json()
    tokens = generate(owner.engine.model, [wanted_prompt], max_new_tokens=12)[0]
    assert found["choices"][0]["message"] == {"role": "assistant", "content": owner.engine.tokenizer.decode(tokens)}
    assert found["usage"]["prompt_tokens"] == len(wanted_prompt) == len(wanted_prompt.tokens) + TOKENS
    text = found["choices"][0]["message"]["content"]
    # Other units, another order, and sensors that are left out because nothing was measured: the same.
    hours = {name: VALUES[name] for name in reversed(SENSORS)}
    hours["sleep_minutes"] = [None if value is None else value / 60 for value in VALUES["sleep_minutes"]]
    assert (
        _text(
            post(
                url,
                message("Tired? Data:", sensor_part(hours, sleep_minutes="h"), " Answer:"),
                max_tokens=12,
                ignore_eos=True,
            )
        )
        == text
    )
    some = {"sleep_minutes": VALUES["sleep_minutes"]}
    rest = {name: [None] * DAYS for name in SENSORS if name not in some}
    answers = {
        _text(post(url, message("Tired? Data:", sensor_part(values), " Answer:"), max_tokens=12, ignore_eos=True))
        for values in (some, some | rest)
    }
    assert len(answers) == 1
    assert answers != {text}, "the data do not matter"
    # An implausible value counts as training counts it.
    clipped = [
        _text(
            post(
                url,
                message("Tired?", sensor_part({"resting_heart_rate": [60, 61, 62, value]})),
                max_tokens=12,
                ignore_eos=True,
            )
        )
        for value in (120, 180)
    ]
    assert clipped[0] == clipped[1]


def _text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_the_served_model_is_as_sure_as_predictions_are(url, run):
    """The log likelihoods by which PH-LLM answers yes or no are those of the first token of the chat."""
    trained = load_sensors(run)
    whole = prompt_of(run, "Tired? Data:", VALUES, " Answer:")
    (at,) = whole.embedded
    lm = LanguageModel(trained.language_model.model, trained.language_model.tokenizer)
    (first,) = lm.generate(whole, max_new_tokens=1, logprobs=4).logprobs
    reader = PromptedLM(
        trained.language_model.model,
        [Prompt(whole.ids[: at.start], whole.ids[at.stop :], tuple((token,) for token, _ in first.top))],
    )
    numbers_1F = torch.from_numpy(trained.statistics.standardised(cohort_of(VALUES)))
    wanted = reader.log_likelihoods(trained.adapter(numbers_1F))[0, 0].tolist()
    assert [value for _, value in first.top] == pytest.approx(wanted, abs=1e-3)
    asked = message("Tired? Data:", sensor_part(), " Answer:")
    found = post(url, asked, max_tokens=1, logprobs=True, top_logprobs=4).json()["choices"][0]["logprobs"]["content"][0]
    assert [one["logprob"] for one in found["top_logprobs"]] == pytest.approx(wanted, abs=1e-3)


def test_streams_choices_caches_and_reads_work_with_sensor_data(url):
    asked = [
        {"role": "system", "content": "Be brief."},
        message("a", sensor_part(), "b"),
        {"role": "assistant", "content": "c"},
    ]
    asked += [message(sensor_part({"sleep_minutes": [300, 301, 302, 303]}), "and now?")]
    fields = {
        "n": 3,
        "temperature": 30.0,
        "seed": 5,
        "max_tokens": 9,
        "cache": {"policy": "d2o", "keep_ratio": 0.5, "min_tokens": 0},
    }
    whole = post(url, *asked, **fields).json()
    chunks = events(post(url, *asked, stream=True, stream_options={"include_usage": True}, **fields).text)
    texts = [
        "".join(
            c["choices"][0]["delta"].get("content") or ""
            for c in chunks
            if c["choices"] and c["choices"][0]["index"] == i
        )
        for i in range(3)
    ]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3
    assert chunks[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert whole["usage"]["attnzoo"]["kv_bytes"] < whole["usage"]["attnzoo"]["kv_bytes_full"]
    names = {"first": "sensor_data[0]", "second": "sensor_data[1]", "rules": "system"}
    read = post(
        url, *asked, max_tokens=2, attention={"read": [{"mass": {"where": {"layers": 0}, "bins": names}}]}
    ).json()
    values = read["choices"][0]["attention"]["read"][0]["values"]
    assert {"first", "second", "rules"} <= set(values)
    assert all(sum(row) > 0 for row in values["first"])


CHANNEL = {"variable": "sleep_minutes", "unit": "min", "values": [400, 401, 402, None]}
DATA = "messages[0].content[1].sensor_data"


def channel(**changes) -> dict:
    return {"channels": [{**CHANNEL, **changes}]}


FIRST = ".channels[0]"
HOSTILE = [
    (None, "", "must be"),
    ([], "", "must be"),
    ("text", "", "must be"),
    ({}, ".channels", "is missing"),
    ({"channels": []}, ".channels", "at least 1 item"),
    ({"channels": {}}, ".channels", "valid list"),
    ({"chanels": [CHANNEL]}, ".chanels", "did you mean 'channels'"),
    ({"channels": [CHANNEL], "tensor": "AAAA"}, ".tensor", "unknown field"),
    ({"channels": [CHANNEL] * 257}, ".channels", "at most 256"),
    ({"channels": [CHANNEL, CHANNEL]}, ".channels[1].variable", r"that of channels\[0\] too"),
    ({"channels": [None]}, FIRST, "must be"),
    (
        channel(variable="sleep_minute"),
        f"{FIRST}.variable",
        "'sleep_minute' is no sensor .* did you mean 'sleep_minutes'",
    ),
    (channel(variable="x" * 500), f"{FIRST}.variable", r"x\.\.\.' is no sensor of this model"),
    (channel(variable="x" * 513), f"{FIRST}.variable", "at most 512 characters"),
    (channel(variable="__class__"), f"{FIRST}.variable", "no sensor of this model; known: resting_heart_rate"),
    (channel(variable=5), f"{FIRST}.variable", "=5 must be a valid string"),
    (channel(unit="furlong"), f"{FIRST}.unit", "'furlong', which is not known for it; give min or one of"),
    (channel(unit=None), f"{FIRST}.unit", "valid string"),
    (channel(values=[400] * 3), f"{FIRST}.values", "has 3 values, and this model takes 4 days"),
    (channel(values=[400] * 5), f"{FIRST}.values", "has 5 values"),
    (channel(values=[]), f"{FIRST}.values", "at least 1 item"),
    (channel(values=[400] * 367), f"{FIRST}.values", "at most 366"),
    (channel(values=[None] * 4), "", "holds no measured value"),
    (channel(values=["400"] * 4), f"{FIRST}.values[0]", "valid number"),
    (channel(values=[400, True, 400, 400]), f"{FIRST}.values[1]", "valid number"),
    (channel(values=[[400]] * 4), f"{FIRST}.values[0]", "valid number"),
    (channel(values=[400, 1e300, 400, 400]), f"{FIRST}.values[1]", "less than or equal to 1000000000"),
    (channel(values=[400, -1, 400, 400]), f"{FIRST}.values[1]", "=-1 min is outside of 0 to 1440 min"),
    (channel(values=[7, 6, 25, 7], unit="h"), f"{FIRST}.values[2]", "=25 h is outside of 0 to 1440 min"),
    (channel(extra=1), f"{FIRST}.extra", "known: variable, unit, values"),
    ({"channels": [{"variable": "sleep_minutes", "unit": "min"}]}, f"{FIRST}.values", "is missing"),
]


@pytest.mark.parametrize(("value", "place", "said"), HOSTILE, ids=[f"{i}{h[1]}" for i, h in enumerate(HOSTILE)])
def test_wrong_sensor_data_is_refused_by_field(url, value, place, said):
    param = DATA + place
    answer = post(url, message("Tired?", {"type": "sensor_data", "sensor_data": value}), max_tokens=1)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == param
    assert re.search(said, error["message"]), error["message"]
    assert error["message"].startswith((param, "unknown field"))
    assert len(error["message"]) < 700


def test_wrong_parts_are_refused_by_field(server, url, run):
    part = sensor_part()
    for messages, name, said in (
        ([message("a", {"type": "sensor_data"})], "messages[0].content[1]", "and nothing else"),
        ([message("a", {**part, "text": "b"})], "messages[0].content[1]", "and nothing else"),
        ([message("a", {"type": ["sensor_data"], "sensor_data": {}})], "messages[0].content[1]", "must be"),
        ([message({"type": "embeddings", "embeddings": [[0.5] * 32]})], "messages[0].content[0]", "must be"),
        ([message({"type": "image_url", "image_url": {"url": "x"}})], "messages[0].content[0]", "of type image_url"),
        ([{**message("a", part), "role": "system"}], "messages[0].content", "only messages of the role user may"),
        ([{**message("a", part), "role": "assistant"}], "messages[0].content", "only messages of the role user may"),
        ([message(*[part] * 17)], "messages", "17 parts that are no text, and at most 16"),
        ([message(part, "word " * 400)], "messages", "this model's context is 256 tokens"),
        ([message(part, "a" * 800)], "messages", "this model's context is 256 tokens"),
    ):  # fmt: skip
        answer = post(url, *messages, max_tokens=1)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name), error
        assert said in error["message"]
    body = json.dumps(
        {"model": NAME, "messages": [message("a", sensor_part({"sleep_minutes": [float("nan")] * DAYS}))]}
    )
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert "NaN is no number in JSON" in answer.json()["error"]["message"]
    # What cannot fit is refused before anything is encoded: embeddings count.
    words = server[1].engine.tokenizer
    text = "a" * (220 * words._longest)
    assert words.least_tokens(text) < 256
    error = post(url, message(*[part] * 16, text), max_tokens=1).json()["error"]
    assert re.search(r"and 48 embeddings have at least 2\d\d; shorten the prompt", error["message"]), error["message"]
    with running_engine(*_plain(run)) as (other, _):
        answer = httpx.post(f"{other}/v1/chat/completions", json={"model": "lm", "messages": [message("a", part)]})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "messages[0].content[1]", "unsupported")
        assert "its language model has no sensor adapter (setting sensors); send text" in error["message"]
        card = httpx.get(f"{other}/v1/models").json()["data"][0]
        assert card["content"] == {}
    assert server[1].engine.scheduler.num_running == 0


def _plain(run) -> tuple[Engine, ServeConfig]:
    config = ServeConfig(checkpoint=str(run.parent / "lm"))
    return Engine(config), config


def test_the_models_card_and_the_document_say_what_a_part_holds(url):
    card = httpx.get(f"{url}/v1/models/{NAME}").json()
    sensors = card["content"]["sensor_data"]
    assert (sensors["days"], sensors["embeddings"]) == (DAYS, TOKENS)
    assert [each["name"] for each in sensors["variables"]] == list(SENSORS)
    assert sensors["trained_with"]["questions"] == {"fatigue": "Tired?"}
    document = httpx.get(f"{url}/openapi.json").json()
    components = {"components": document["components"]}
    jsonschema.validate(card, {"$ref": "#/components/schemas/ModelCard", **components})
    request = {"$ref": "#/components/schemas/ChatRequest", **components}
    jsonschema.validate({"model": NAME, "messages": [message("a", sensor_part())]}, request)
    for wrong in (channel(values=[]), channel(extra=1), {}):
        body = {"model": NAME, "messages": [message({"type": "sensor_data", "sensor_data": wrong})]}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body, request)


def test_a_failing_adapter_fails_its_request_alone_and_no_log_holds_the_data(server, url, monkeypatch, caplog):
    modality = server[1].engine.modalities["sensor_data"]

    def broken(content):
        raise RuntimeError(f"{content.value.grid.values_NTV[0, 0].tolist()}")

    values = {"resting_heart_rate": [SECRET] * DAYS}
    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG):
        patched.setattr(modality, "encode", broken)
        answer = post(url, message("a", sensor_part(values)), max_tokens=1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "request_failed")
    with caplog.at_level(logging.DEBUG):
        assert post(url, message("a", sensor_part(values)), max_tokens=1).status_code == 200
        assert (
            post(url, message("a", sensor_part({"sleep_minutes": [SECRET, -5, 1, 1]})), max_tokens=1).status_code == 400
        )
    assert str(SECRET) not in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "MAX_LONG", 0)
        answer = post(url, message("a", sensor_part()), max_tokens=1)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert post(url, message("a"), max_tokens=1).status_code == 200


def test_python_answers_as_the_server_does(server, run):
    url, owner = server
    trained = load_sensors(run)
    lm = LanguageModel(trained.language_model.model, trained.language_model.tokenizer)
    rows = trained.embeddings(cohort_of(VALUES))[0]
    content = [{"type": "text", "text": "Tired?"}, {"type": "embeddings", "embeddings": rows}]
    found = lm.chat([{"role": "user", "content": content}], max_new_tokens=8, read=[Mass()])
    assert found.text == _text(post(url, message("Tired?", sensor_part()), max_tokens=8))
    assert found.reading is not None
    del owner


def test_what_cannot_be_served_is_refused_at_the_start(run, tmp_path, monkeypatch):
    lm, other = run.parent / "lm", sensor_models.language_model(tmp_path / "other", "mha")
    plain = serving.export(tmp_path / "plain")
    settings = absolute_paths({"checkpoint": str(run)})
    assert settings == {"checkpoint": str(lm), "sensors": str(run / "export"), "model_name": NAME}
    check_checkpoint(build_serve_config({**settings, "port": 0}))
    assert ServeConfig(checkpoint=str(run / "export")).served_name == NAME
    parts = load_parts(EngineConfig(checkpoint=str(run)), None, None)
    assert list(parts.modalities) == ["sensor_data"]
    for given, said in (
        ({"checkpoint": str(other), "sensors": str(run)}, "was trained with another language model than"),
        ({"checkpoint": str(run), "sensors": str(run)}, "is a sensor adapter, and so is sensors="),
        (
            {"checkpoint": str(lm), "sensors": str(run), "dtype": "bfloat16"},
            "dtype='bfloat16': the adapter in .* float32; leave dtype out",
        ),
        ({"checkpoint": str(lm), "sensors": str(tmp_path)}, "^sensors=.* holds no sensor adapter; give the run or"),
        ({"checkpoint": str(plain), "sensors": str(run)}, "has no chat template"),
    ):
        with pytest.raises(ValueError, match=said):
            load_parts(EngineConfig(**given), None, None)
    # An adapter whose language model was named by a path that leads nowhere from here.
    monkeypatch.chdir(run.parent)
    frozen = FrozenLM.load("lm")
    moved = save_sensors(tmp_path / "moved" / "export", sensor_models.adapter_of(frozen))
    assert absolute_paths({"checkpoint": str(moved)})["checkpoint"] == str(lm)
    monkeypatch.chdir(tmp_path)
    for read in (
        lambda: absolute_paths({"checkpoint": str(moved)}),
        lambda: load_parts(EngineConfig(checkpoint=str(moved)), None, None),
    ):
        with pytest.raises(ValueError, match=r"in front of another model: .*'lm'.* checkpoint=\.\.\. sensors="):
            read()
    assert list(load_parts(EngineConfig(checkpoint=str(lm), sensors=str(moved)), None, None).modalities) == [
        "sensor_data"
    ]
    content = json.loads((moved / "config.json").read_text())
    content["language_model"] = {}
    (moved / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        absolute_paths({"checkpoint": str(moved)})
