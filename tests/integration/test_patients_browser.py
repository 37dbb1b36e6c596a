"""The page at /patients in headless Chromium, with a real mouse and keyboard, before a server with a clinical model."""

import json
import re

import httpx
import pytest

from serve.clinical.loading import load_clinic
from serve.clinical.page import DIRECTORY
from serve.config import ServeConfig
from serve.openai.routes import build_app
from tests.helpers.browser import needs_browser
from tests.helpers.clinical_files import FHIR_START, fhir_bundle, fhir_observation, fhir_stays
from tests.helpers.clinical_models import NAMES, WINDOW, export, icu_cohort, request_of, small_trained
from tests.helpers.http_server import serving
from tests.helpers.patients_page import EVIL, alone, answer, ask, channels, contrast, paste, predict, visit
from tests.helpers.static_page import check_open, give_key

pytestmark = needs_browser
TIP = "[...document.querySelectorAll('#tip:not([hidden]) div')].map(e => e.textContent).join('; ')"


@pytest.fixture(scope="module")
def cohort():
    return icu_cohort()


@pytest.fixture(scope="module")
def app_of(cohort, tmp_path_factory):
    checkpoint = export(tmp_path_factory.mktemp("patients"), small_trained(cohort, judged=0)).parent

    def build(**settings):
        config = ServeConfig(checkpoint=str(checkpoint), **settings)
        return build_app(None, config, load_clinic(config))

    return build


@pytest.fixture(scope="module")
def url(app_of):
    with serving(app_of(), lifespan="auto") as url:
        yield url


@pytest.fixture
def shown(seen, url):
    with alone(seen, url):
        yield seen
        assert seen.value("document.scripts.length + document.images.length") == 2  # the module and the icon


def cells(shown):
    """What the table says of each (hour, variable): (class, name, colour)."""
    listed = shown.value(
        "[...document.querySelectorAll('#heat td[data-hour]')].map(e => [Number(e.dataset.hour), "
        "e.closest('tr').querySelector('th').textContent, e.className, e.getAttribute('aria-label'), "
        "getComputedStyle(e).backgroundColor])"
    )
    return {(hour, variable): rest for hour, variable, *rest in listed}


@pytest.mark.parametrize("explain", ["gradients", "attention"])
def test_the_table_shows_the_cells_of_the_reply(shown, url, cohort, explain):
    """Every cell, by its class, its name, its colour, and what hovering says; nothing where nothing was measured."""
    request = request_of(cohort, [2])
    free = next(hour for hour in range(WINDOW) if not cohort.grid.counts_NTV[2, hour, NAMES.index("Temp")])
    request["patients"][0]["measurements"] += [
        {"variable": "HR", "hour": 1.5, "value": 260, "unit": "/min"},
        {"variable": "Temp", "hour": free + 0.5, "value": 98, "unit": "Cel"},
    ]
    patient = answer(url, request, explain=explain)["patients"][0]
    (explanation,) = patient["explanations"]
    given = {(each["hour"], each["variable"]): each for each in patient["cells"]}
    parts = {(each["hour"], each["variable"]): each["contribution"] for each in explanation["cells"]}
    predict(shown, request)
    if explain == "attention":
        shown.click("#maps input[value='attention']")
        shown.wait("document.querySelector('#meaning').textContent.includes('not a cause')")
    assert explanation["faithfulness"] in shown.text("#meaning")
    shown.click("#never")
    found = cells(shown)
    assert set(found) == {(hour, name) for hour in range(WINDOW) for name in NAMES}
    most = max(parts.values(), key=abs)
    for at, (kind, said, colour) in found.items():
        cell = given.get(at)
        assert ("measured" in kind.split()) == bool(cell and cell["measured"]), at
        assert ("flagged" in kind.split()) == bool(cell and cell["flag"]), at
        if not cell or not cell["measured"]:
            assert "not measured" in said
            assert channels(colour) == [0, 0, 0, 0]  # the hatching of its row is seen
            continue
        part = parts[at]
        number = float(re.search(r"(?:by|;) (?:< )?([\d.e-]+)(?: % of the attention)?$", said)[1])
        if explain == "attention":
            assert number == pytest.approx(part * 100, rel=6e-3)
        else:
            assert number == pytest.approx(abs(part), abs=6e-3 if abs(part) >= 1 else 6e-4)
            assert ("raises" in said, "lowers" in said) == (part > 0, part < 0)
            red, _, blue = channels(colour)
            assert (red - blue) * part >= 0, "orange raises, blue lowers"
            if part == most:
                assert abs(red - blue) > 60
    assert "repeating-linear-gradient" in shown.value("getComputedStyle(heat.tBodies[0].rows[0]).backgroundImage")
    assert "implausible" in found[1, "HR"][1]
    assert "98 °C was refused: implausible" in found[free, "Temp"][1]

    at = next(key for key, each in given.items() if each["measured"] and each["count"] > 1 and key[1] == "Glucose")
    selector = f"#heat tr[data-variable='{NAMES.index('Glucose')}'] td[data-hour='{at[0]}']"
    shown.hover(selector)
    tip = shown.value(TIP)
    assert "mg/dL" in tip
    assert float(re.search(r"([\d.]+) mg/dL", tip)[1]) == pytest.approx(given[at]["value"], rel=6e-3)
    shown.value(f"document.querySelector({selector!r}).focus()")
    assert shown.value(TIP) == tip
    assert shown.text("#values .name") == "Glucosemg/dL"
    shown.press("ArrowRight")
    assert f"hour {at[0] + 1}" in shown.text("#readout")
    shown.press("Escape")
    assert shown.value("document.querySelector('#tip').hidden")


def test_the_prediction_is_told(shown, url, cohort):
    """Number, interval, base rate, curve, findings, digests, cut-off and what was left out; the curve by keyboard."""
    request = request_of(cohort, [5])
    request["patients"][0] |= {"admitted": "2026-03-01T08:00:00+01:00", "cutoff_hour": 10}
    request["patients"][0]["measurements"] += [{"variable": "Glucose", "hour": 2, "value": 6, "unit": "spoons"}]
    reply = answer(url, request, explain="gradients", hourly=True)
    (patient,) = reply["patients"]
    predict(shown, request)
    assert shown.text("#who") == "Patient stay 5"
    assert float(shown.text("#risk .number").rstrip(" %")) == pytest.approx(100 * patient["probability"], abs=0.51)
    assert reply["base_rate"]["words"] in shown.text("#risk")
    assert reply["interval"]["words"] in shown.text("#risk details")
    points = shown.value(
        "[...document.querySelectorAll('#curve circle')].map(e => [+e.dataset.hour, +e.getAttribute('cy')])"
    )
    known = [each for each in patient["by_hour"] if each["status"] == "ok"]
    assert [hour for hour, _ in points] == [each["hour"] for each in known]
    assert len(shown.value("[...document.querySelectorAll('#curve .gap')].map(e => 1)")) == 10 - len(known)
    (y0, p0), (y1, p1) = ((points[n][1], known[n]["probability"]) for n in (0, -1))
    base = shown.value("+document.querySelector('#curve .base').getAttribute('y1')")
    assert (base - y0) * (p1 - p0) == pytest.approx((reply["base_rate"]["probability"] - p0) * (y1 - y0), abs=0.3)
    assert shown.value("document.querySelectorAll('#curve .band').length") == 1
    listed = shown.value(
        "[...document.querySelectorAll('#findings button')].map(e => e.textContent.replace(/[▲▼]/, ''))"
    )
    assert listed == [each["words"] for each in patient["explanations"][0]["findings"]]
    facts = shown.text("#fact-list")
    for each in (
        "10 hours of the stay, 2026-03-01 18:00 +01:00",
        reply["model"]["version"][:12],
        patient["input_digest"][:12],
    ):
        assert each in facts
    assert "1 unknown unit: Glucose 1" in shown.text("#rejected")
    assert patient["measurements"]["examples"][0]["words"] in shown.text("#rejected")
    assert shown.text("#early") == reply["early_hours"]
    assert reply["research_use_only"] in shown.text("#warning")
    shown.value("document.querySelector('#curve').focus()")
    shown.press("ArrowLeft")
    assert shown.text("#readout").startswith("risk after 9 hours: ")
    assert shown.value("document.querySelector('#curve').getAttribute('aria-valuenow')") == "9"


def test_a_stream_draws_the_curve_as_it_comes(shown, cohort):
    shown.value(
        "window.told = []; new MutationObserver(() => told.push(who.textContent + document.querySelectorAll("
        "'#curve circle').length)).observe(document.querySelector('#curve'), {childList: true})"
    )
    predict(shown, request_of(cohort, [4]))
    told = shown.value("told")
    points = [int(each.removeprefix("The prediction so far")) for each in told if each.startswith("The prediction")]
    assert points == sorted(set(points))
    assert len(points) > 1, "the curve came at once"  # what came together is drawn and seen together
    assert told[-1].startswith("Patient stay 4")


def test_without_enough_data_there_is_no_number_and_ids_are_text(shown, cohort):
    request = request_of(cohort, [0, 3])
    request["patients"][1]["id"] = EVIL
    request["patients"][0]["measurements"][0]["variable"] = EVIL
    predict(shown, request)
    assert EVIL in shown.text("#rejected")
    assert shown.value("[...document.querySelectorAll('#patients span')].map(e => e.textContent)") == ["stay 0", EVIL]
    shown.click("#patients button:nth-child(2)")
    assert shown.text("#who") == f"Patient {EVIL}"
    assert shown.text("#risk .none") == "Not enough data"
    assert not re.search(r"\d %", shown.text("#risk").replace("0.0 %", "").split("needed")[0].split("at least")[0])
    assert (
        shown.value("[document.querySelector('#risk .number'), document.querySelector('#curve circle')]") == [None] * 2
    )


def test_more_patients_than_are_explained_get_numbers_and_the_reason(seen, app_of, cohort):
    with serving(app_of(max_explained=1), lifespan="auto") as url:
        visit(seen, url)
        predict(seen, request_of(cohort, [0, 2]))
        assert "max_explained" in seen.text("#findings")
        assert seen.text("#risk .number").endswith(" %")
        assert seen.value("document.querySelector('#heat').hidden && !document.querySelector('#curve').hidden")


def test_refusals_are_told_in_the_servers_words_and_nothing_is_lost(shown, url, cohort):
    request = request_of(cohort, [0])
    request["patients"][0]["measurements"][1]["value"] = EVIL
    broken = json.dumps(request_of(cohort, [0]))[:-1]
    for content in (json.dumps(request), '{"patients": [], "patients": [1e400]}', broken):
        paste(shown, content)
        shown.click("#send")
        shown.wait("!document.querySelector('#problem').hidden")
        refusal = httpx.post(f"{url}/v1/predict", content=content, headers={"content-type": "application/json"})
        assert refusal.status_code == 400
        assert refusal.json()["error"]["message"] in shown.text("#problem")
        assert str(refusal.json()["error"]["param"] or "") in shown.text("#problem")
        assert shown.value("document.querySelector('#request').value") == content
        shown.problems[:] = [each for each in shown.problems if "400" not in each]
        shown.value("document.querySelector('#problem').hidden = true")
    shown.value(
        "const files = new DataTransfer(); files.items.add(new File(['{\"patients\": []}'], 'a.json')); "
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}))"
    )
    shown.wait("document.querySelector('#kind').textContent === 'request for 0 patients'")
    shown.click("#back")
    assert shown.value("document.querySelector('#request').value") == broken


def test_a_fhir_bundle_is_predicted(shown):
    heart = [fhir_observation(f"o{hour}", hour * 60 + 5, "8867-4", 80 + hour, "/min") for hour in range(6)]
    predict(shown, fhir_bundle([*fhir_stays(), *heart]))
    assert shown.text("#asked").startswith("FHIR Bundle")
    said = cells(shown)
    assert [said[hour, "HR"][0] for hour in range(6)] == ["measured"] * 6
    assert f"{FHIR_START:%Y-%m-%d}" in shown.text("#fact-list")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_narrow_screen(shown, url, scheme):
    """No horizontal scrolling but that of the table, legible colours, and the warning always in sight."""
    shown.media(scheme)
    visit(shown, url, 390, 844)
    ask(shown, "#examples")
    assert shown.value("document.documentElement.scrollWidth") <= 390
    assert shown.value("(e => e.scrollWidth > e.clientWidth)(document.querySelector('#scroll'))")
    shown.value("scrollTo(0, document.documentElement.scrollHeight)")
    top, bottom = shown.value("(b => [b.top, b.bottom])(document.querySelector('#warning').getBoundingClientRect())")
    assert 0 <= top < bottom < 844
    assert shown.text("#warning").startswith("Research use only.")
    shades = {
        selector: shown.value(f"getComputedStyle(document.querySelector({selector!r})).{what}")
        for selector, what in (("body", "backgroundColor"), (".card", "backgroundColor"), ("#who", "color"))
    }
    shades["soft"] = shown.value("getComputedStyle(document.querySelector('#fact-list dt')).color")
    for text in ("#who", "soft"):
        for ground in ("body", ".card"):
            assert contrast(channels(shades[text]), channels(shades[ground])) >= 4.5, (text, ground)
    unnamed = shown.value(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => "
        "!e.textContent.trim() && !e.labels?.length && !e.hidden).map(e => e.id)"
    )
    assert unnamed == []
    shown.media("light")


def test_the_page_is_open_and_asks_for_the_key(seen, app_of, cohort, monkeypatch):
    monkeypatch.setenv("PATIENTS_KEY", "s3cret")
    with serving(app_of(api_key_env="PATIENTS_KEY"), lifespan="auto") as url:
        check_open(url, "/patients", "default-src 'none'; script-src 'self'; style-src 'self'")
        seen.problems.clear()
        give_key(seen, url, "/patients", "s3cret")
        seen.wait("!document.querySelector('#example').disabled")
        predict(seen, request_of(cohort, [1]))
        assert seen.text("#who") == "Patient stay 1"


def test_the_files_hold_no_handlers_styles_or_foreign_addresses():
    for path in DIRECTORY.iterdir():
        if path.suffix in (".html", ".js", ".css", ".svg"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(
                r"https?:|innerHTML|outerHTML|insertAdjacent|\bon\w+=|style=|localStorage|eval\(", text
            ), path
