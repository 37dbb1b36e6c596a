"""`attnzoo attention`: the data of a page, what it escapes, what it refuses, and what the command writes."""

import base64
import io
import json
import re
import struct
import sys
from html.parser import HTMLParser

import pytest
import torch

import attnzoo
from attnzoo.attention.edits import EditRun, Edits, LayerSizes, Map, TokenLayout
from attnzoo.attention.edits.traits import Editing
from attnzoo.attention_page import ModelMaps, Selection, Token, maps, page, page_bytes, read_maps, select, tokens_of
from attnzoo.attention_page.encoding import decoded_weights, encoded_weights, readable
from attnzoo.attention_page.maps import HeadMaps
from attnzoo.cli import main
from attnzoo.language_model import LanguageModel
from attnzoo.models import DecoderConfig, DecoderLM
from tests.helpers import serving

EVIL = "</script><script>alert(1)</script><!-- <script> & \" ' ]]> \u2028"
TEXT = "The state of the Zustand\n数据 🚀"


class Parts(HTMLParser):
    """What a parser of HTML makes of a page: its elements, and the text of every script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


def data_of(text):
    return json.loads(Parts(text).scripts[0])


def mixed_lm(*kinds):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=serving.TOKENS,
        model_dim=20,
        num_layers=len(kinds),
        attention=[{"kind": kind, "num_heads": 5} for kind in kinds],
        max_positions=40,
    )
    return LanguageModel(DecoderLM(config).eval(), serving.tokenizer(), name="mixed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(serving.export(tmp_path_factory.mktemp("tiny") / "export", "rcmha"))


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_weights_come_back(tokens):
    """The layout that the script reads: head by head, query by query, keys up to the query. Kills: transposed maps,
    heads interleaved, the other order of bytes."""
    weights = torch.rand(3, tokens, tokens).tril() * torch.tensor([1.0, -1.0, 300.0])[:, None, None]
    text = encoded_weights(weights)
    torch.testing.assert_close(decoded_weights(text, 3, tokens), weights.half(), rtol=0, atol=0)
    assert len(text) - 2 <= page_bytes(3, tokens) <= len(text)
    n, query, key = 2, tokens - 1, tokens // 2
    at = 2 * (n * tokens * (tokens + 1) // 2 + query * (query + 1) // 2 + key)
    (found,) = struct.unpack_from("<e", base64.b64decode(text), at)
    assert found == weights.half()[n, query, key].item()


def test_no_token_ends_the_script():
    weights = torch.ones(1, 2, 2).tril()
    made = page(ModelMaps(EVIL, 1, (Token(EVIL), Token(EVIL, True)), (HeadMaps(0, EVIL, (0,), weights),), (EVIL,)))
    plain = page(ModelMaps("x", 1, (Token("a"), Token("b", True)), (HeadMaps(0, "c", (0,), weights),), ("d",)))
    shape = [(tag, sorted(attrs)) for tag, attrs in Parts(plain).elements]
    assert [(tag, sorted(attrs)) for tag, attrs in Parts(made).elements] == shape
    data = data_of(made)
    assert data["tokens"] == [{"text": EVIL, "control": False}, {"text": EVIL, "control": True}]
    assert (data["model"], data["notes"], data["layers"][0]["variant"]) == (EVIL, [EVIL], EVIL)
    assert not set("<>&") & set(Parts(made).scripts[0])
    assert EVIL not in made
    assert "\u2028" not in made


def test_the_policy_names_what_runs_and_nothing_is_fetched():
    weights = torch.ones(1, 1, 1)
    made = Parts(page(ModelMaps("m", 1, (Token("a"),), (HeadMaps(0, "MHA", (0,), weights),), ())))
    (policy,) = [attrs["content"] for tag, attrs in made.elements if attrs.get("http-equiv")]
    assert re.fullmatch(r"default-src 'none'; script-src 'sha256-\S{44}'; style-src 'sha256-\S{44}'", policy)
    assert {"href", "src", "style", "onclick"}.isdisjoint({name for _, attrs in made.elements for name in attrs})
    assert not re.search(
        r"https?://|innerHTML|insertAdjacentHTML|document\.write|fetch\(|\beval\(", "".join(made.scripts)
    )


def test_tokens_as_people_read_them():
    assert readable("a\tb\r\n\x1b\u202e\u200b") == "a⇥b␍⏎U+001BU+202EU+200B"
    tokenizer = serving.tokenizer()
    ids = tokenizer.encode("Emoji: 🙂 Ω", bos=True)
    found = tokens_of(tokenizer, ids)
    assert found[0] == Token(tokenizer.spelling(ids[0]), True)
    parts = [each.text for each in found if each.text.startswith("\\x")]
    assert "".join(parts).startswith("\\xf0\\x9f\\x99\\x82") or any("🙂" in each.text for each in found)
    assert all(not each.control for each in found[1:])


def test_maps_are_those_of_the_model(checkpoint):
    """Kills: kv heads for query heads; a layer under another's number; picks that are ignored."""
    lm = attnzoo.load(checkpoint)
    found = read_maps(lm, TEXT, Selection(layers=[1, 0], heads="1:3"))
    ids = lm.encode(TEXT)
    run = EditRun(lm.model.plan_edits(Edits(Map(dtype="fp32")), TokenLayout(len(ids))))
    lm.model(torch.tensor([ids]), edits=[run])
    assert [(each.layer, each.variant, each.heads) for each in found.layers] == [(n, "RCMHA", (1, 2)) for n in (0, 1)]
    for each in found.layers:
        expected = run.reading[each.layer].map[1:3]
        torch.testing.assert_close(each.weights_NTT.float(), expected, rtol=2**-10, atol=1e-7)
        torch.testing.assert_close(each.weights_NTT.float().sum(-1), torch.ones(2, len(ids)), rtol=0, atol=2e-3)
        assert not each.weights_NTT.triu(1).any()
    assert len(found.tokens) == len(ids)


def test_layers_without_weights():
    """Left out with the reason where all are meant, refused where they are named, or where none is left."""
    lm = mixed_lm("mha", "mesa", "linear")
    found = read_maps(lm, TEXT, Selection())
    assert [each.layer for each in found.layers] == [0, 2]
    (note,) = found.notes
    assert note.startswith("layer 1 (Mesa")
    assert note.endswith("it is left out")
    with pytest.raises(ValueError, match=r"layers=\[0, 1\]: layer 1"):
        read_maps(lm, TEXT, Selection(layers=[0, 1]))
    with pytest.raises(ValueError, match=r"layers=1: layer 1 \(Mesa.*no key has a weight.*layers that have: \[0, 2\]"):
        read_maps(lm, TEXT, Selection(layers=1))
    with pytest.raises(ValueError, match=r"layers=all: layer 0 .*; no layer of this model has"):
        read_maps(mixed_lm("mesa"), TEXT, Selection())
    implied = found.layers[1].weights_NTT
    assert implied.any()
    assert data_of(page(found))["notes"] == [note]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": 7}, "layers=7 is out of range: there are 2, numbered 0 to 1"),
        ({"heads": [0, 4]}, "layer 0: heads=4 is out of range: there are 4"),
        ({"layers": "0-2"}, "layers='0-2': give 'all', whole numbers, ranges"),
        ({"heads": True}, "heads=True: give 'all'"),
        ({"heads": []}, r"heads=\(\) selects nothing"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number from 1 to 2048"),
        ({"max_tokens": 4096}, "max_tokens=4096 must be a whole number from 1 to 2048"),
        ({"max_tokens": 5}, r"the text has \d+ tokens, and a page of 2 layers with 8 heads 0.0 MB; max_tokens=5"),
    ],
)
def test_selections_that_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        read_maps(serving.lm_of("mha"), TEXT, Selection(**chosen))


def test_pages_that_are_refused(monkeypatch):
    lm = serving.lm_of("mha")
    with pytest.raises(ValueError, match="the text is empty"):
        read_maps(lm, "", Selection())
    with pytest.raises(ValueError, match="the model's context 64; shorten it"):
        read_maps(lm, "word " * 90, Selection(max_tokens=2048))
    monkeypatch.setattr(maps, "MAX_PAGE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"the most is 0.0 MB: name fewer layers= or heads="):
        read_maps(lm, TEXT, Selection())
    assert read_maps(lm, "The", Selection(layers=0, heads=0)).layers
    lm.model.blocks[0].attention.requires_grad_(False)
    for parameter in lm.model.blocks[1].attention.parameters():
        parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layer 1 \(MHA\) has weights that are no numbers"):
        read_maps(lm, "The", Selection(heads=0))


def test_layers_of_other_numbers_of_heads():
    """A head that one layer lacks is named with the layer."""
    sizes = [
        LayerSizes(num_heads=n, num_kv_heads=n, head_dim=4, variant="MHA", editing=Editing(reads=True)) for n in (2, 6)
    ]
    assert select(sizes, Selection(heads=1)) == ({0: (1,), 1: (1,)}, ())
    assert select(sizes, Selection(layers=1, heads="4:")) == ({1: (4, 5)}, ())
    with pytest.raises(ValueError, match="layer 0: heads=3 is out of range"):
        select(sizes, Selection(heads=3))


def test_the_command_writes_a_page(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["attention", checkpoint, TEXT]) == 0
    printed = capsys.readouterr().out
    lm = attnzoo.load(checkpoint)
    tokens = len(lm.encode(TEXT))
    assert printed.startswith(f"attention.html: 2 layers, 8 heads, {tokens} tokens, ")
    data = data_of((tmp_path / "attention.html").read_text(encoding="utf-8"))
    assert (data["num_layers"], [each["layer"] for each in data["layers"]]) == (2, [0, 1])
    for each, expected in zip(data["layers"], read_maps(lm, TEXT, Selection()).layers, strict=True):
        assert torch.equal(decoded_weights(each["weights"], 4, tokens), expected.weights_NTT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    (tmp_path / "below").mkdir()
    assert main(["attention", checkpoint, "-", "layers=-1", "heads=[0, 2]", "--out", "below/one.html"]) == 0
    found = data_of((tmp_path / "below" / "one.html").read_text(encoding="utf-8"))["layers"]
    assert [(each["layer"], each["heads"]) for each in found] == [(1, [0, 2])]
    assert not list(tmp_path.rglob(".*"))


def test_a_file_is_replaced_only_on_request(checkpoint, tmp_path, capsys):
    out = tmp_path / "mine.html"
    out.write_text("mine")
    words = ["attention", checkpoint, "The", "--out", str(out)]
    assert main(words) == 2
    assert f"--out={str(out)!r} is there already; give another path, or --replace" in capsys.readouterr().err
    assert out.read_text() == "mine"
    for wrong, said in (("heads=9", "heads=9 is out of range"), ("layers=9", "layers=9 is out of range")):
        assert main([*words, wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["attention", f"{checkpoint}x", *words[2:]]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "link.html").symlink_to("nowhere")
    assert main([*words[:-1], str(tmp_path / "link.html")]) == 2
    assert main([*words, "--replace"]) == 0
    assert data_of(out.read_text(encoding="utf-8"))["tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "DIR"], "is a directory; give the path of a file in it"),
        (["--out", "DIR/file/below.html"], "file' is a file, not a directory; give another path"),
        (["--out", "n" * 300], "cannot be written (File name too long); give another path"),
        (["--out", "/proc/none/x.html"], "there is no directory '/proc/none'; make it, or give another path"),
        (["--out", "none/below/x.html"], "there is no directory 'none/below'; make it"),
        (["--out", "/dev/null", "--replace"], "--out='/dev/null' is a device or a pipe"),
        (["--out", "~no_such_user/x"], "--out='~no_such_user/x': there is no user"),
        (["layer=1"], "unknown option 'layer'; did you mean 'layers'? known: heads, layers, max_tokens"),
        (["layers"], "'layers' is not of the form key=value, for example layers=0:4"),
        (["heads=9"], "layer 0: heads=9 is out of range"),
        (["--device", "tpu0"], "device='tpu0' cannot be used"),
    ],
)
def test_wrong_usage(words, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    assert main(["attention", checkpoint, "The", *(word.replace("DIR", str(tmp_path)) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("attnzoo attention: error: ")
    assert message in captured.err
    assert not captured.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_forgotten_text(capsys):
    assert main(["attention", "smollm2", "layers=1"]) == 2
    assert "the text is missing: 'layers=1' is an option; write it after the text" in capsys.readouterr().err
