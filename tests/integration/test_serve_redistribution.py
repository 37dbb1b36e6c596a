"""Redistribution over HTTP: answers are those of the declared edits, and the reply says what the edits did."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import jsonschema
import numpy as np
import pytest
import torch

from attnzoo.attention.edits import After, EditRun, Edits, HeadFilter, Mass, Move, Sinks, TokenLayout, Where
from attnzoo.models import generate
from attnzoo.models.embedded import prompt_tensor
from attnzoo.vision.redistribution import redistribution, sinks_of
from attnzoo.vision.trained_pictures import TrainedPictures, load_pictures
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.engine import Engine
from serve.openai.redistribution import IMAGE, Redistributed, Redistribution, _read_of
from tests.helpers import picture_models, serving
from tests.helpers.emoji_fonts import needs
from tests.helpers.http_server import events, running_engine
from tests.helpers.picture_models import image_part, message, picture_model, some_picture

pytestmark = needs("openmoji")
NAME, ASKED = "looker", "how many objects are there?"
GIVEN = {"p": 0.7, "rho": 0.5, "least": 0.15}
PICTURES = np.stack([some_picture(seed) for seed in range(4)])
Server = tuple[str, AsyncEngine]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_models.export(tmp_path_factory.mktemp("sinks") / NAME, picture_model(sinks=True))


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedPictures:
    return load_pictures(run)


@pytest.fixture(scope="module")
def edits(trained: TrainedPictures) -> Edits:
    return Edits(*redistribution(sinks_of(trained), **GIVEN))


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    config = ServeConfig(checkpoint=str(run), max_num_seqs=4, max_batched_tokens=24, attention="edit")
    with running_engine(Engine(config), config) as found:
        yield found


@pytest.fixture
def url(server: Server) -> str:
    return server[0]


def post(url: str, picture: np.ndarray | None, **fields: object) -> httpx.Response:
    parts = [] if picture is None else [image_part(picture)]
    body = {"model": NAME, "messages": [message(*parts, ASKED)], "temperature": 0, "max_tokens": 8, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def choice_of(answer: httpx.Response) -> dict:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_answers_are_those_of_the_declared_edits_beside_others(
    url: str, trained: TrainedPictures, edits: Edits
) -> None:
    plain, edited = trained.answers(PICTURES, ASKED), trained.answers(PICTURES, ASKED, edits=edits)
    assert plain != edited, "the edits do not matter"
    asked = [(picture, given) for picture in PICTURES for given in (False, GIVEN)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda each: choice_of(post(url, each[0], redistribution=each[1])), asked))
    assert [choice["message"]["content"] for choice in found[::2]] == plain
    assert [choice["message"]["content"] for choice in found[1::2]] == edited
    assert all(
        ("redistribution" in choice) == (given is not False) for choice, (_, given) in zip(found, asked, strict=True)
    )
    # One after another too, whatever was asked before.
    for picture, text in zip(PICTURES[:2], edited, strict=False):
        assert choice_of(post(url, picture, redistribution=GIVEN))["message"]["content"] == text


def test_the_reply_says_what_was_moved(url: str, trained: TrainedPictures, edits: Edits) -> None:
    """What it derives from the weights afterwards is what reads before each layer's edit find."""
    choice = choice_of(post(url, PICTURES[0], redistribution=GIVEN, ignore_eos=True))
    reply, model = choice["redistribution"], trained.language_model.model
    assert {name: reply[name] for name in GIVEN} == GIVEN
    assert [layer["layer"] for layer in reply["layers"]] == [edit.where.layers[0] for edit in edits.items]
    prompt = trained.prompt(PICTURES[0], ASKED)
    lead = trained.language_model.tokenizer
    (tokens,) = generated(trained, edits)
    assert lead.decode(tokens).removeprefix(" ") == choice["message"]["content"]
    layout = TokenLayout(len(prompt), prompt.spans)
    whole = torch.cat([prompt_tensor(model, [prompt])[0], model.embedding.weight[tokens[:-1]]])[None]
    changed = 0
    for at, (edit, told) in enumerate(zip(edits.items, reply["layers"], strict=True)):
        where = Where(layers=edit.where.layers, queries=After("image"))
        bins = {"picture": "image", "sinks": edit.where.keys, "either": ("image", edit.where.keys)}
        values = []
        for some in (edits.items[:at], edits.items[: at + 1]):
            run = EditRun(model.plan_edits(Edits(*some, Mass(where, bins=bins)), layout, 7))
            model(whole, edits=[run])
            values.append(run.reading[edit.where.layers[0]].mass)
        before, after = values
        moved_NQ = before["sinks"] - after["sinks"]
        heads = (moved_NQ > 1e-5).any(1).nonzero()[:, 0].tolist()
        changed += len(heads)
        assert told["heads"] == heads
        assert told["moved"] == pytest.approx(moved_NQ[heads].mean(1).tolist(), abs=1e-5)
        assert told["queries"] == moved_NQ.shape[1]
        for name, key in (("picture", "picture"), ("sink", "sinks")):
            assert told[name] == pytest.approx([float(before[key].mean()), float(after[key].mean())], abs=1e-5)
        assert told["sinks"] == run.positions(edit.where.layers[0], edit.where.keys)
        assert 0 in told["sinks"]
    assert changed
    first = reply["layers"][0]
    inside = [place for start, stop in prompt.spans["image"] for place in range(start, stop) if place in first["sinks"]]
    assert 0 < len(inside) < 16, "the picture has no sinks of its own"
    assert len(first["heads"]) > 0
    before, after = first["picture"]
    assert after >= before


def generated(trained: TrainedPictures, edits: Edits) -> list[list[int]]:
    """Eight tokens, whatever they are."""
    prompt = trained.prompt(PICTURES[0], ASKED)
    return generate(trained.language_model.model, [prompt], max_new_tokens=8, edits=[trained.plan(prompt, edits, 8)])


def test_streams_choices_and_reads_have_it_too(url: str) -> None:
    fields = {"redistribution": GIVEN, "ignore_eos": True}
    whole = choice_of(post(url, PICTURES[1], **fields))
    chunks = events(post(url, PICTURES[1], stream=True, **fields).text)
    assert [chunk for chunk in chunks if "redistribution" in chunk["choices"][0]] == chunks[-1:]
    assert chunks[-1]["choices"][0]["redistribution"] == whole["redistribution"]
    several = post(url, PICTURES[1], n=2, temperature=5.0, seed=1, **fields).json()["choices"]
    assert all(choice["redistribution"]["layers"] for choice in several)
    # What is read beside it is of the edited attention, and counts from 0.
    where = {"layers": [0, 2], "queries": {"after": "image_url[0]"}}
    read = [{"mass": {"where": where, "bins": {"x": "image_url[0]"}}}]
    told = choice_of(post(url, PICTURES[1], attention={"read": read}, **fields))
    assert told["redistribution"] == whole["redistribution"]
    assert [(each["read"], each["layer"]) for each in told["attention"]["read"]] == [(0, 0), (0, 2)]
    assert [each["layer"] for each in told["attention"]["layers"]] == [0, 2]
    mean = np.mean(told["attention"]["read"][0]["values"]["x"])
    assert mean == pytest.approx(whole["redistribution"]["layers"][0]["picture"][1], abs=1e-4)
    fields = {"attention": {"read": read}, "max_tokens": 1}  # of the same tokens, and so in the first layer before
    before, after = (choice_of(post(url, PICTURES[1], redistribution=x, **fields)) for x in (None, GIVEN))
    means = [np.mean(each["attention"]["read"][0]["values"]["x"]) for each in (before, after)]
    assert "redistribution" not in before
    assert means == pytest.approx(after["redistribution"]["layers"][0]["picture"], abs=1e-4)
    assert means[0] < means[1]
    document = httpx.get(f"{url}/openapi.json").json()
    components = {"components": document["components"]}
    jsonschema.validate(told, {"$ref": "#/components/schemas/ChatChoice", **components})
    body = {"model": NAME, "messages": [message(image_part(PICTURES[0]))]}
    request = {"$ref": "#/components/schemas/ChatRequest", **components}
    for good in (True, False, None, {}, {"p": 0.5}):
        jsonschema.validate({**body, "redistribution": good}, request)
    for wrong in (5, "true", {"q": 1}, {"p": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**body, "redistribution": wrong}, request)


def test_true_means_the_numbers_of_the_paper_and_sinks_are_measured_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, owner = server
    calls = []
    monkeypatch.setattr("serve.engine.sinks_of", lambda trained: calls.append(1) or sinks_of(trained))
    owner.engine._sinks = None
    found = [choice_of(post(url, PICTURES[0], redistribution=given)) for given in (True, {}, {"p": 0.6, "rho": 0.8})]
    assert all(each == found[0] for each in found)
    assert len(calls) == 1
    assert found[0]["redistribution"]["least"] == 0.2
    moves = redistribution(owner.engine.sinks(), image="x")
    assert moves[0].only_heads == HeadFilter(of="x", min_mass=0.2, min_share=0.8)
    assert all(a.where.layers < b.where.layers for a, b in pairwise(moves))


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        (5, "redistribution", 'redistribution must be true, false, or an object such as {"p": 0.6, "rho": 0.8}'),
        ("yes", "redistribution", "redistribution must be true"),
        ({"p": 1.0}, "redistribution.p", "=1.0 must be less than or equal to 0.99"),
        ({"p": 0}, "redistribution.p", "=0 must be greater than 0"),
        ({"rho": 1.5}, "redistribution.rho", "=1.5 must be less than or equal to 1"),
        ({"least": "a"}, "redistribution.least", '="a" must be a valid number'),
        ({"roh": 0.5}, "redistribution.roh", "unknown field 'redistribution.roh'; did you mean 'rho'?"),
    ],
)
def test_a_wrong_field_is_refused(url: str, value: object, param: str, said: str) -> None:
    answer = post(url, PICTURES[0], redistribution=value)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert said in answer.json()["error"]["message"]


def test_where_nothing_can_be_redistributed_the_reason_is_said(url: str, run: Path, tmp_path: Path) -> None:
    def refused(at: str, picture: np.ndarray | None = PICTURES[0], **fields: object) -> str:
        answer = post(at, picture, redistribution=True, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) in ((400, "redistribution"), (400, "attention")), error
        return error["message"]

    assert "gives attention to one picture, and the conversation has none; send one" in refused(url, None)
    hide = {"edits": [{"hide": {"where": {"keys": 0}}}]}
    assert "attention.edits: the request has redistribution, too" in refused(url, attention=hide)
    completion = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "a", "redistribution": True})
    assert completion.json()["error"]["param"] == "redistribution"
    read = ServeConfig(checkpoint=str(run), attention="read")
    with running_engine(Engine(read), read) as (other, _):
        assert "this server does not allow (its setting attention=read); leave it out" in refused(other)
        assert choice_of(post(other, PICTURES[0], redistribution=False))["message"]["content"]
    without = ServeConfig(
        checkpoint=str(picture_models.export(tmp_path / NAME, picture_model())), attention="edit", max_images=2
    )
    with running_engine(Engine(without), without) as (other, _):
        message_of = refused(other)
        assert "no layer of this model has sinks whose attention could be redistributed (no massive" in message_of
        assert message_of.endswith("leave it out")
        two = {"messages": [message(image_part(PICTURES[0]), image_part(PICTURES[1]), ASKED)]}
        assert "to one picture, and the conversation has 2" in refused(other, **two)
    plain = ServeConfig(checkpoint=str(serving.export(tmp_path / "plain")), model_name=NAME, attention="edit")
    model, words = serving.small_model("mha", max_len=128), serving.chat_tokenizer()
    with running_engine(Engine(plain, model=model, tokenizer=words), plain) as (other, _):
        assert "gives attention to pictures, and this server's model reads none" in refused(other, None)


def test_where_no_token_is_a_sink_no_head_has_changed(trained: TrainedPictures) -> None:
    """Whatever looks at the picture. Kills: heads that pass the filter, said to have been changed."""
    model, prompt = trained.language_model.model, trained.prompt(PICTURES[0], ASKED)
    spans = {IMAGE: prompt.spans["image"]}
    moves = [
        Move(Where(layers=layer, keys=Sinks((0,), 1e9), queries=After(IMAGE)), IMAGE, 0.6, HeadFilter(of=IMAGE))
        for layer in range(2)
    ]
    given = Redistributed(Redistribution(least=0, rho=0), tuple(moves), tuple(map(_read_of, moves)))
    run = EditRun(model.plan_edits(Edits(*moves, *given.reads), TokenLayout(len(prompt), spans), 1))
    model(prompt_tensor(model, [prompt]), edits=[run])
    for layer in given.reply(run)["layers"]:
        assert (layer["sinks"], layer["heads"], layer["moved"]) == ([], [], [])
        assert layer["picture"][0] == layer["picture"][1] > 0
