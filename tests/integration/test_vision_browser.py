"""The page at /vision in headless Chromium, with a real mouse and keyboard, before a server with a diffusion model."""

import base64
import re
import time

import httpx
import numpy as np
import pytest

from attnzoo.vision.compose import ComposeOptions, Placement, compose
from serve.drawing.page import DIRECTORY
from tests.helpers.browser import needs_browser
from tests.helpers.diffusion_models import (
    SIDE,
    app_of,
    backdrop,
    drawn,
    export,
    pixels_of,
    small_diffusion,
    thing,
)
from tests.helpers.http_server import serving
from tests.helpers.patients_page import channels, contrast
from tests.helpers.static_page import check_open, give_key
from tests.helpers.vision_page import drop, put

pytestmark = needs_browser
READY = "!document.querySelector('#draw').disabled"
PROMPTS = {
    "background-prompt": "a sketch of a car on a blue plain background",
    "prompt": "a sketch of a car and a dog on a blue plain background",
    "object-words": "a dog",
}


@pytest.fixture(scope="module")
def trained():
    return small_diffusion()


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return export(tmp_path_factory.mktemp("vision"), trained)


@pytest.fixture(scope="module")
def url(checkpoint):
    with serving(app_of(checkpoint), lifespan="auto") as url:
        yield url


def visit(seen, url, width=1280, height=1000):
    seen.open(f"{url}/vision", width, height)
    seen.wait(READY)


@pytest.fixture
def shown(seen, url):
    """The page is open, asks nobody but this server, and nothing of it is refused or thrown."""
    seen.requests.clear()
    seen.problems.clear()
    visit(seen, url)
    yield seen
    asked = {
        each.partition("/")[0] + "//" + each.split("/")[2] for each in seen.requests if not each.startswith("data:")
    }
    assert asked == {url}
    assert not seen.problems


def pixels(seen, selector):
    """uint8 [H, W, 4] of a canvas."""
    height, width, data = seen.value(
        f"(() => {{ const e = document.querySelector({selector!r}); const d = e.getContext('2d').getImageData(0, 0, "
        "e.width, e.height).data; return [e.height, e.width, btoa(Array.from(d, (each) => "
        "String.fromCharCode(each)).join(''))]; })()"
    )
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)


def region(seen):
    return [int(seen.value(f"document.querySelector('#{name}').value")) for name in ("left", "top", "width", "height")]


def mouse(seen, kind, x, y):
    seen.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)


def drag(seen, start, end):
    """Presses at (selector, across, down), moves, and lets go at another. Both are in sight."""
    x0, y0 = seen.hover(*start)
    x1, y1 = seen.value(
        f"(() => {{ const b = document.querySelector({end[0]!r}).getBoundingClientRect(); "
        f"return [b.left + b.width * {end[1]}, b.top + b.height * {end[2]}]; }})()"
    )
    mouse(seen, "mousePressed", x0, y0)
    for share in (0.3, 0.7, 1):
        mouse(seen, "mouseMoved", x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)
    mouse(seen, "mouseReleased", x1, y1)


def test_a_composition_is_that_of_the_library(shown, trained):
    """Files for both pictures, numbers for the region, words and options typed, steps watched."""
    drop(shown, "#stage", backdrop())
    drop(shown, "#object", thing())
    shown.wait("document.querySelector('#object').width === 6")
    put(shown, width=6, height=6, left=3, top=5)
    assert region(shown) == [3, 5, 6, 6]
    assert "6 × 6 pixels, 3 from the left and 5 from the top, of 16 × 16" in shown.text("#place-words")
    stage = pixels(shown, "#stage")
    assert stage.shape[:2] == (SIDE * 16, SIDE * 16)
    assert np.array_equal(stage[8::16, 8::16][:4, :, :3], backdrop()[:4])
    put(shown, steps="3", **{name: value for name, value in PROMPTS.items() if name != "prompt"})
    assert shown.value("document.querySelector('#prompt').value") == PROMPTS["prompt"]
    shown.value(
        "window.told = []; new MutationObserver(() => told.push(progress.textContent)).observe("
        "document.querySelector('#progress'), {childList: true})"
    )
    shown.click("#compose")
    shown.wait("!document.querySelector('#keep').hidden")
    case = Placement(
        backdrop(), thing(), 3, 5, PROMPTS["background-prompt"], PROMPTS["prompt"], PROMPTS["object-words"]
    )
    expected = drawn(compose(trained, [case], ComposeOptions(steps=3)))
    assert np.array_equal(pixels(shown, "#result")[..., :3], expected)
    steps = [int(each) for line in shown.value("told") for each in re.findall(r"step (\d+) of 9", line)]
    assert steps == sorted(set(steps))
    assert len(steps) > 3, "the steps came at once"
    assert "10 calls of the model" in shown.text("#facts")
    shown.click("#keep")
    assert np.array_equal(pixels(shown, "#stage")[8::16, 8::16][0, :, :3], expected[0])


def test_a_drawn_background_is_that_of_its_seed(shown, url):
    prompt = "a photo of an apple on a red plain background"
    put(shown, **{"draw-prompt": prompt, "seed": "11"})
    shown.click("#draw")
    shown.wait("document.querySelector('#facts').textContent.includes('seed 11')")
    body = {"model": "tiny", "prompt": prompt, "seed": 11}
    found = httpx.post(f"{url}/v1/images/generations", json=body, timeout=30).json()["data"][0]["b64_json"]
    assert np.array_equal(pixels(shown, "#result")[..., :3], pixels_of(found))
    assert shown.value("document.querySelector('#background-prompt').value") == prompt
    words = shown.value("document.querySelector('#object-words').value")
    if words:  # where the machine has a font with the example's emoji
        assert shown.value("document.querySelector('#prompt').value") == prompt.replace(" on ", f" and {words} on ")


def test_the_region_by_mouse(shown):
    """Drawn on the stage, moved, and the object dragged from its own canvas onto the background."""
    drop(shown, "#object", thing())
    shown.wait("document.querySelector('#object').width === 6")
    drag(shown, ("#stage", 0.03, 0.03), ("#stage", 0.22, 0.28))
    assert region(shown) == [0, 0, 4, 5]
    drag(shown, ("#stage", 0.1, 0.1), ("#stage", 0.6, 0.35))
    assert region(shown) == [8, 4, 4, 5]
    drag(shown, ("#object", 0.5, 0.5), ("#stage", 0.25, 0.75))
    assert region(shown) == [2, 10, 4, 5]


def test_everything_by_keyboard(shown):
    drop(shown, "#object", thing())
    shown.wait("document.querySelector('#object').width === 6")
    put(shown, left=3, top=5, width=6, height=6)
    shown.value("document.querySelector('#stage').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        shown.press(key)
    assert region(shown) == [5, 4, 6, 6]
    for kind in ("rawKeyDown", "keyUp"):
        shown.call("Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown", modifiers=8)
    assert region(shown) == [5, 4, 6, 7]
    for _ in range(30):
        shown.press("ArrowLeft")
    assert region(shown) == [-5, 4, 6, 7], "a column of it stays in the picture"
    order = []
    shown.value("document.querySelector('#key').focus()")
    for _ in range(40):
        order.append(shown.value("document.activeElement.id || document.activeElement.tagName"))
        shown.press("Tab")
    needed = [
        "key",
        "draw-prompt",
        "seed",
        "draw",
        "open-background",
        "open-object",
        "place",
        "stage",
        "left",
        "height",
    ]
    needed += ["background-prompt", "prompt", "object-words", "compose"]
    assert [each for each in order if each in needed][: len(needed)] == needed
    unnamed = shown.value(
        "[...document.querySelectorAll('button, input, canvas')].filter(e => !e.textContent.trim() && "
        "!e.labels?.length && !e.hidden && !e.getAttribute('aria-label')).map(e => e.id)"
    )
    assert unnamed == []


def test_refusals_are_told_in_the_servers_words_and_nothing_is_lost(shown):
    drop(shown, "#object", thing())
    shown.wait("document.querySelector('#object').width === 6")
    put(shown, **{**PROMPTS, "prompt": "<img src=x> and a dog"})
    shown.click("#compose")
    shown.wait("!document.querySelector('#problem').hidden")
    assert "prompt has the word '<img', which this model has not learned" in shown.text("#problem")
    assert shown.text("#problem code") == "prompt"
    assert shown.value("document.querySelector('#prompt').value") == "<img src=x> and a dog"
    assert shown.value("document.images.length") == 1
    drop(shown, "#stage", thing(), name="b.png")
    shown.wait("document.querySelector('#problem').hidden")
    shown.value(
        "(() => { const files = new DataTransfer(); files.items.add(new File(['no picture'], '<b>.png')); document"
        ".querySelector('#stage').dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true})); })()"
    )
    shown.wait("!document.querySelector('#problem').hidden")
    assert "<b>.png" in shown.text("#problem")
    shown.problems[:] = [each for each in shown.problems if "400" not in each]


def test_stopping_ends_the_work(seen, checkpoint):
    app = app_of(checkpoint, max_draw_steps=100_000)
    with serving(app, lifespan="auto") as url:
        visit(seen, url)
        drop(seen, "#object", thing())
        seen.wait("document.querySelector('#object').width === 6")
        put(seen, steps="100000", **PROMPTS)
        seen.click("#compose")
        seen.wait("document.querySelector('#progress').textContent.includes('of 300000')")
        seen.click("#stop")
        seen.wait("document.querySelector('#progress').textContent.startsWith('Stopped')")
        for _ in range(200):
            if app.state.studio._running == 0:
                break
            time.sleep(0.02)
        assert app.state.studio._running == 0
        assert seen.value("document.querySelector('#stop').hidden && document.querySelector('#problem').hidden")


def test_the_page_is_open_and_asks_for_the_key(seen, checkpoint, monkeypatch):
    monkeypatch.setenv("VISION_KEY", "s3cret")
    with serving(app_of(checkpoint, api_key_env="VISION_KEY"), lifespan="auto") as url:
        check_open(url, "/vision", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'")
        give_key(seen, url, "/vision", "s3cret")
        seen.wait(READY)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_narrow_screen(shown, url, scheme):
    shown.media(scheme)
    visit(shown, url, 390, 844)
    assert shown.value("document.documentElement.scrollWidth") <= 390
    ground, text = (
        channels(shown.value(f"getComputedStyle(document.querySelector({one!r})).{what}"))
        for one, what in ((".card", "backgroundColor"), (".soft", "color"))
    )
    assert contrast(text, ground) >= 4.5
    shown.media("light")


def test_the_files_hold_no_handlers_styles_or_foreign_addresses():
    for path in DIRECTORY.iterdir():
        if path.suffix in (".html", ".js", ".css", ".svg"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(
                r"https?:|innerHTML|outerHTML|insertAdjacent|\bon\w+=|style=|localStorage|eval\(", text
            ), path
