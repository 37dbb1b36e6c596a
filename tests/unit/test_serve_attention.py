"""What the server takes in the field `attention`, and where it keeps maps, without a server."""

import pytest
import torch

from attnzoo.attention.edits import Edit, EditRun, Edits, Read, TokenLayout
from attnzoo.attention.edits.spans import NoPlace
from attnzoo.attention.edits.wire import KINDS
from attnzoo.tokenizer import SentencePieceTokenizer
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from attnzoo.tokenizer.spans import message_spans
from serve.config import ServeConfig
from serve.maps import MapsFullError, MapStore
from serve.openai.attention import MAX_ITEMS, MAX_PIECES, check_size, read_field
from serve.openai.errors import dump
from serve.openai.readings import INLINE_BYTES, inline_bytes, map_bytes, written
from tests.helpers.serving import CHAT_TEMPLATE, small_model, tokenizer_path

MASS = {"mass": {"where": {"layers": 0, "keys": 0}}}
HIDE = {"hide": {"where": {"keys": 0}}}


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_kind_is_an_edit_or_a_read():
    assert all(issubclass(kind, Edit) != issubclass(kind, Read) for kind in KINDS.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "asks for nothing"),
        ({"edits": [], "read": None}, "asks for nothing"),
        ({"reads": [MASS]}, "unknown field 'reads'; did you mean 'read'"),
        ({"read": [HIDE]}, r"attention.read\[0\] is an edit; move it to attention.edits"),
        ({"edits": [HIDE, MASS]}, r"attention.edits\[1\] is a read; move it"),
        ({"read": [{"mas": {}}]}, r"attention.read\[0\]: unknown read or edit 'mas'; did you mean 'mass'"),
        ({"read": [{"mass": {"wher": {}}}]}, r"attention.read\[0\].mass: unknown field 'wher'"),
        ({"read": [{"mass": {"where": {"layer": 0}}}]}, r"attention.read\[0\].mass.where: unknown field 'layer'"),
        ({"read": [{"map": {"layers": 0}}]}, r"read\[0\].map: unknown field 'layers'; did you mean where.layers\?"),
        ({"read": ["entropy"]}, r"read\[0\]='entropy' must be an object with one name, such as {\"entropy\": {...}}"),
        ({"read": "mass"}, "attention.read='mass' must be a list"),
        ({"read": [MASS], "edits": False}, "attention.edits=False must be a list"),
        ({"read": [[]]}, r"attention.read\[0\]=\[\] must be an object with one name"),
        ({"read": [MASS], "spans": {"a": [1]}}, r"attention.spans.a=\[1\] must be a text"),
        ({"read": [MASS], "spans": {"a": [[1, 2], 3]}}, "attention.spans.a="),
        ({"read": [MASS], "spans": {"a": None}}, "attention.spans.a="),
        ({"read": [MASS], "spans": [1]}, "attention.spans="),
        ({"read": [MASS], "spans": {f"s{n}": "a" for n in range(17)}}, "has 17 names; at most 16"),
        ({"edits": [{"put_weights": {"where": {}, "weights": [[[None]]]}}]}, "must be numbers in nested lists"),
        ({"edits": [{"put_scores": {"where": {}, "scores": {"a": 1}}}]}, "must be numbers in nested lists"),
        (
            {"edits": [{"put_weights": {"where": {}, "weights": [[[1], [1, 2]]]}}]},
            "must be numbers in nested lists",
        ),
        (
            {"edits": [{"scale": {"where": {}, "factor": 2, "renormalise": "no"}}]},
            "Scale.renormalise='no' must be true or false",
        ),
        (
            {"edits": [{"temper": {"where": {}, "factor": 2, "magnitude": 1}}]},
            "Temper.magnitude=1 must be true or false",
        ),
        (
            {"edits": [{"move": {"where": {}, "share": 0.5, "only_heads": {"min_mass": "x"}}}]},
            "HeadFilter.min_mass='x' must be",
        ),
        ({"edits": [{"hide": {"where": {"keys": {"sinks": {"channels": 3, "tau": 1}}}}}]}, "attention.edits"),
    ],
    ids=str,
)
def test_refusals_name_the_field(given, message):
    with pytest.raises(ValueError, match=message):
        read_field(given, "edit")


def test_a_server_that_reads_edits_nothing():
    assert len(read_field({"read": [MASS]}, "read")[1]) == 1
    with pytest.raises(ValueError, match="can be read, not edited"):
        read_field({"edits": [HIDE], "read": [MASS]}, "read")


def test_what_a_plan_would_weigh_for_long_is_refused():
    """Each of these takes seconds or for ever to plan."""

    def size(where, count=1, spans=None):
        items = read_field({"edits": [{"hide": {"where": where}}] * count}, "edit")[0]
        check_size(items, spans or {})

    size({"keys": list(range(MAX_PIECES - 4))})
    size({"keys": ["a", {"except": "a"}]}, spans={"a": [(0, 1)] * (MAX_PIECES // 2 - 2)})
    sinks = [{"sinks": {"channels": [c], "tau": 2}} for c in range(30)]
    for where, count, spans, message in (
        ({"keys": list(range(MAX_PIECES))}, 1, None, "numbers, spans and places of names"),
        ({"queries": list(range(MAX_PIECES))}, 1, None, "numbers, spans and places of names"),
        ({"steps": list(range(MAX_PIECES))}, 1, None, "numbers, spans and places of names"),
        ({"keys": {"after": "a"}}, 1, {"a": [(0, 1)] * MAX_PIECES}, "numbers, spans and places of names"),
        ({"keys": {"sinks": {"channels": list(range(MAX_PIECES)), "tau": 2}}}, 1, None, "places of names"),
        ({}, MAX_ITEMS + 1, None, "33 edits and reads; at most 32"),
        ({"keys": sinks[:3]}, 1, None, "3 kinds of sinks; at most 2"),
    ):
        with pytest.raises(ValueError, match=message):
            size(where, count, spans)
    bins = {"mass": {"bins": {f"b{n}": n for n in range(MAX_PIECES)}}}
    with pytest.raises(ValueError, match="places of names"):
        check_size(read_field({"read": [bins]}, "read")[1], {})


def test_maps_stay_for_their_time_and_within_their_bytes():
    clock = Clock()
    store = MapStore(100, 10.0, clock)
    first = store.reserve(60)
    with pytest.raises(MapsFullError, match="take 41 bytes, and 60 of 100 are in use") as full:
        store.reserve(41)
    assert full.value.wait_s == 1
    name = first.put(b"x" * 50)
    assert (store.nbytes, store.get(name)) == (60, b"x" * 50)
    first.deliver()
    first.close()
    first.close()
    assert store.nbytes == 50
    clock.now += 4
    with pytest.raises(MapsFullError) as full:
        store.reserve(51)
    assert full.value.wait_s == 6
    store.reserve(0).close()
    second = store.reserve(50)
    lost = second.put(b"y" * 20)
    clock.now += 5.9
    assert store.get(name) is not None
    second.close()  # the client never got the name
    assert (store.get(lost), store.nbytes) == (None, 50)
    clock.now += 0.2
    assert (store.get(name), store.nbytes, store.reserved) == (None, 0, 0)


@pytest.mark.parametrize("kind", ["mha", "window"])
def test_what_is_written_takes_no_more_than_was_planned(kind):
    """The bytes of every read in the answer, and of every map as a file, are known before."""
    reads = [
        {"mass": {"where": {"heads": [0, 2]}, "bins": {"a\u2028": 0, "rest": {"except": 0}}}},
        {"top_keys": {"k": 3, "where": {"layers": 1}}},
        {"key_sums": {"where": {"keys": {"span": [1, 5]}}}},
        {"map": {"where": {"layers": -1, "heads": 3, "queries": [0, {"span": [2, 6]}]}}},
        {"map": {"dtype": "fp32", "where": {"layers": 0}}},
        {"entropy": {}},
    ]
    model = small_model(kind)
    plan = model.plan_edits(Edits.from_json(reads), TokenLayout(9), 0)
    run = EditRun(plan)
    with torch.no_grad():
        model(torch.arange(3, 12)[None], edits=[run])
    found = written(run)
    assert sum(len(data) for _, data in found.files) == map_bytes(plan)
    assert len(dump(found.reply)) <= inline_bytes(plan) < INLINE_BYTES
    assert len(dump(found.reply)) > inline_bytes(plan) / 4
    assert [entry["shape"] for entry, _ in found.files] == [[4, 9, 9], [1, 5, 9]]
    entries = {(entry["kind"], entry["layer"]): entry for entry in found.reply["read"]}
    assert entries["map", 1]["queries"] == [[0, 1], [2, 6]]
    assert entries["key_sums", 0]["keys"] == [[1, 5]]
    reading = run.reading
    assert entries["mass", 0]["values"]["rest"][1][3] == pytest.approx(float(reading[0].mass["rest"][1, 3]), rel=1e-5)
    assert entries["top_keys", 1]["values"]["positions"] == reading[1].top["positions"].tolist()
    assert [(entry["read"], entry["layer"]) for entry in found.reply["read"]] == [
        (0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (3, 1), (4, 0), (5, 0), (5, 1)
    ]  # fmt: skip


def test_a_read_of_queries_that_never_came_is_empty():
    """The text ended with its first token."""
    reads = [{"map": {"where": {"queries": "generated", "layers": 0}}}, {"mass": {}}]
    run = EditRun(small_model("mha").plan_edits(Edits.from_json(reads), TokenLayout(4), 3))
    found = written(run)
    assert [(entry["read"], entry["queries"], entry["map"]) for entry in found.reply["read"]] == [
        (0, [], None), (1, [], None), (1, [], None)
    ]  # fmt: skip
    assert (found.files, found.reply["layers"]) == ([], [])


MESSAGES = [("system", "user: be a state"), ("user", "user"), ("assistant", " slots "), ("user", "the state, the user")]
TRIMMED = CHAT_TEMPLATE.replace("message.content }}", "message.content | trim }}")


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TRIMMED])
def test_messages_are_named_in_a_chat(source):
    """Contents that also stand elsewhere, in a role and in one another. Kills: the first place of a text."""
    words = SentencePieceTokenizer.load(tokenizer_path())
    words.chat_template = source
    chat = ChatEncoder.of(words)
    messages = [{"role": role, "content": content} for role, content in MESSAGES]
    tokens = chat.encode(messages)
    found = message_spans(chat.template, words, messages, tokens)
    ends = [index for index, token in enumerate(tokens) if token == words.encode("a", eos=True)[-1]]
    assert len(ends) == len(messages)
    for index, (_, content) in enumerate(MESSAGES):
        ((start, stop),) = found[f"messages[{index}]"]
        text = b"".join(map(words.token_bytes, tokens[start:stop])).decode()
        assert content.strip() in text
        assert len(text) <= len(content) + 3
        assert ends[index] - 1 <= stop <= ends[index]
    assert found["user"] == found["messages[1]"] + found["messages[3]"]
    assert found["system"] == found["messages[0]"]


def test_messages_that_a_template_changes_have_no_names():
    words = SentencePieceTokenizer.load(tokenizer_path())
    messages = [{"role": role, "content": content} for role, content in MESSAGES]
    for change in ("message.content | upper }}", "message.content ~ message.content }}", "message.content[1:] }}"):
        words.chat_template = CHAT_TEMPLATE.replace("message.content }}", change)
        chat = ChatEncoder.of(words)
        for some in (messages, messages[:1]):
            found = message_spans(chat.template, words, some, chat.encode(some))
            assert all(isinstance(each, NoPlace) for each in found.values())
    words.chat_template = CHAT_TEMPLATE
    chat = ChatEncoder.of(words)
    messages[1]["content"] = ""
    found = message_spans(chat.template, words, messages, chat.encode(messages))
    certain = {name for name, each in found.items() if isinstance(each, list)}
    assert certain == {"messages[0]", "messages[2]", "messages[3]", "system", "assistant"}
    assert found["user"] == found["messages[1]"]
    check_size(read_field({"read": [{"mass": {"where": {"keys": "user"}}}]}, "read")[1], found)
    many = message_spans(chat.template, words, messages[:1] * 65, [1])
    assert "conversations of more than 64 messages have no names" in many["system"].why


def test_settings_are_checked():
    assert ServeConfig(checkpoint="x").attention == "off"
    for values, message in (
        ({"attention": "write"}, "attention='write' is not known; choose one of off, read, edit"),
        ({"attention_max_bytes": 0}, "attention_max_bytes=0 must be at least 1"),
        ({"attention_max_bytes": 1 << 29}, "attention_max_bytes"),
        ({"attention_total_bytes": 5}, "attention_total_bytes=5 is less than one request may have"),
        ({"attention_ttl_s": 0.0}, "attention_ttl_s=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            ServeConfig(checkpoint="x", **values)
