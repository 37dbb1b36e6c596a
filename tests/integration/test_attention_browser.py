"""The page of `attnzoo attention` in headless Chromium, with a real mouse and keyboard."""

import itertools

import pytest
import torch

from attnzoo.attention_page import ModelMaps, Selection, Token, page, read_maps
from attnzoo.attention_page.maps import HeadMaps
from tests.helpers import serving
from tests.helpers.browser import needs_browser

pytestmark = needs_browser
EVIL = "</script><img src=x onerror=window.hurt=1>"
TOKENS = (Token("<s>", True), Token(EVIL), Token(" the"), Token("\u23ce"), Token("数据"))
HALF = [[1.0], [0.25, 0.75], [0.5, 0.125, 0.375], [0.0, 0.0, 0.0625, 0.9375], [0.5, 0.25, 0.125, 0.0625, 0.0625]]


def triangle(rows):
    return torch.tensor([row + [0.0] * (len(rows) - len(row)) for row in rows])


@pytest.fixture
def shown(seen, tmp_path):
    """Shows maps, and sees that the page asked for nothing and that nothing of it was refused."""

    def show(maps, **size):
        seen.requests.clear()
        seen.problems.clear()
        path = tmp_path / "page.html"
        path.write_text(page(maps), encoding="utf-8")
        seen.open(path, **size)
        return seen

    yield show
    assert len(seen.requests) == 1
    assert seen.requests[0].startswith("file://")
    assert not seen.problems


def small_maps():
    """Two layers of one and two heads; those of the second layer are numbered 1 and 3, and one has negative weights."""
    first = HeadMaps(0, "MHA", (0,), triangle(HALF)[None].half())
    other = torch.stack([torch.eye(5), -2 * triangle(HALF)])
    return ModelMaps(EVIL, 4, TOKENS, (first, HeadMaps(2, "LinearAttention", (1, 3), other.half())), (EVIL,))


def pair(query, key):
    """Where in the map the middle of a cell is."""
    return {"across": (key + 0.5) / 5, "down": (query + 0.5) / 5}


def colour(found, query, key):
    return found.value(f"[...document.querySelector('#map').getContext('2d').getImageData({key}, {query}, 1, 1).data]")


def test_numbers_on_hover(shown):
    found = shown(small_maps())
    assert found.text("#summary") == "2 of 4 layers, 3 heads, 5 tokens"
    assert found.text("#notes") == EVIL
    for query, row in enumerate(HALF):
        for key, weight in enumerate(row):
            found.hover("#map", **pair(query, key))
            said = found.text("#readout")
            assert said.startswith(f"query {query} “")
            assert f" → key {key} “" in said
            assert float(said.rpartition(": ")[2]) == pytest.approx(weight, rel=5e-3)
            assert found.text("#tip") == said
    found.hover("#map", **pair(1, 4))
    assert (
        found.text("#readout")
        == f"query 1 “{EVIL.replace(' ', '·')}” → key 4 “数据”: hidden (the key comes after the query)"
    )
    assert found.value("window.hurt") is None
    assert found.value("document.images.length + document.scripts.length") == 2  # the data and the script


def test_heads_are_chosen_by_mouse_and_keyboard(shown):
    found = shown(small_maps())
    assert found.text("#head-title") == "Layer 0, head 0 (MHA)"
    found.click("button[aria-label='layer 2, head 3']")
    assert found.text("#head-title") == "Layer 2, head 3 (LinearAttention)"
    assert [found.text("#least"), found.text("#most")] == ["-2.00", "2.00"]
    found.hover("#map", **pair(3, 3))
    assert found.text("#readout").endswith(": -1.88")
    found.press("ArrowLeft")
    assert found.text("#head-title") == "Layer 2, head 1 (LinearAttention)"
    assert found.value("location.hash") == "#layer=2&head=1"
    found.value("document.querySelector('#cells').focus()")
    for key, said in (
        ("ArrowLeft", "key 2"),
        ("ArrowUp", "query 2"),
        ("ArrowDown", "query 3"),
        ("ArrowRight", "key 3"),
    ):
        found.press(key)
        assert said in found.text("#readout")
    assert found.text("#readout").endswith(": 1.00")
    reached = set()
    found.value("document.activeElement.blur()")
    for _ in range(9):
        found.press("Tab")
        reached.add(found.value("document.activeElement.id || document.activeElement.tagName"))
    assert {"scale", "BUTTON", "size", "cells", "SPAN"} <= reached


def test_the_text_is_coloured(shown):
    found = shown(small_maps())
    darkness = "[...document.querySelectorAll('#text span')].map(e => e.style.background.match(/\\d+/)?.[0])"
    found.hover("#text span:nth-of-type(5)")
    assert found.text("#readout").startswith("query 4 “数据” attends most to: 0 “<s>” 0.500, 1 “")
    red = [int(each) for each in found.value(darkness)]
    assert red == sorted(red)
    assert len(set(red)) == 4  # the last two weigh the same
    found.click("#text span:nth-of-type(3)")
    found.hover("#text span:nth-of-type(2)")
    assert found.text("#readout").endswith("”: 0.125")
    assert found.text("#readout").startswith("query 2 “·the” → key 1")
    found.press("Escape")
    found.click("input[value='from']")
    found.hover("#text span:nth-of-type(3)")
    assert found.text("#readout") == "key 2 “·the” gets most from: 2 “·the” 0.375, 4 “数据” 0.125, 3 “⏎” 0.0625"


def test_scales_of_colours(shown):
    """A sixteenth stands at a quarter of the square roots, and at 1 + log10(1/16) / 4 of the logarithms."""
    found = shown(small_maps())
    reds = {}
    for scale in ("linear", "root", "log"):
        found.value(f"s = document.querySelector('#scale'); s.value = '{scale}'; s.dispatchEvent(new Event('change'))")
        reds[scale] = [colour(found, *at)[0] for at in ((3, 0), (3, 2), (2, 2), (0, 0))]
        assert reds[scale] == sorted(reds[scale], reverse=True)
    white, blue, navy = 255, 0x5A, 0x08
    assert reds["linear"][1] == pytest.approx(white + (blue - white) / 8, abs=2)
    assert reds["root"][1] == pytest.approx(white + (blue - white) / 2, abs=2)
    assert reds["log"][1] == pytest.approx(blue + (navy - blue) * (1 - 2 * 0.301), abs=2)


def test_on_a_narrow_screen_a_click_leads_to_the_head(shown):
    found = shown(small_maps(), width=420, height=300)
    found.click("button[aria-label='layer 2, head 3']")
    top = found.value("document.querySelector('#head-title').getBoundingClientRect().top")
    assert 0 <= top < 100
    assert found.value("document.documentElement.scrollWidth") <= 420


def test_light_and_dark(shown):
    found = shown(small_maps())
    faces = []
    for scheme in ("light", "dark"):
        found.media(scheme)
        hidden, nothing, everything = colour(found, 0, 1), colour(found, 3, 0), colour(found, 0, 0)
        assert hidden[3] == 0
        assert nothing[3] == everything[3] == 255
        contrast = abs(sum(nothing[:3]) - sum(everything[:3])) / 3
        assert contrast > 120
        faces.append((sum(nothing), found.value("getComputedStyle(document.body).backgroundColor")))
    assert faces[0][0] > faces[1][0]
    assert faces[0][1] != faces[1][1]
    found.media("light")


@pytest.mark.parametrize("tokens", [1, 300])
def test_labels_are_legible(tokens, shown):
    """Labels do not overlap, and that of the hovered token is there whatever is left out."""
    weights = torch.full((2, tokens, tokens), 1 / tokens).tril().half()
    names = tuple(Token(f" token{index}") for index in range(tokens))
    found = shown(ModelMaps("many", 1, names, (HeadMaps(0, "MHA", (0, 1), weights),), ()))
    tops = found.value(
        "[...document.querySelectorAll('#queries div:not(.here)')].map(e => e.getBoundingClientRect().top)"
    )
    assert all(b - a >= 12 for a, b in itertools.pairwise(tops))
    assert len(tops) >= min(tokens, 60)
    query, key = 7 * tokens // 10, tokens // 5
    found.hover("#map", across=(key + 0.5) / tokens, down=(query + 0.5) / tokens)
    assert found.text("#queries .here") == f"·token{query}"
    assert found.text("#keys .here") == f"·token{key}"
    assert f"query {query} “·token{query}” → key {key} “·token{key}”: " in found.text("#readout")


def test_a_model_is_shown(shown):
    lm = serving.lm_of("rcmha")
    maps = read_maps(lm, "The state of the Zustand", Selection())
    found = shown(maps)
    found.click("button[aria-label='layer 1, head 2']")
    tokens = len(maps.tokens)
    for query, key in ((tokens - 1, 0), (tokens - 2, 3)):
        found.hover("#map", across=(key + 0.5) / tokens, down=(query + 0.5) / tokens)
        weight = float(found.text("#readout").rpartition(": ")[2])
        assert weight == pytest.approx(float(maps.layers[1].weights_NTT[2, query, key]), rel=6e-3)
