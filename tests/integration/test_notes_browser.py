"""The page at /patients before a model that reads texts, in headless Chromium: words of the pasted text by label."""

import json
import re

import httpx
import pytest

from serve.clinical.loading import load_clinic
from serve.config import ServeConfig
from serve.openai.routes import build_app
from tests.helpers.browser import needs_browser
from tests.helpers.clinical_models import export, icu_cohort, request_of, small_trained
from tests.helpers.clinical_notes import NAME, export_notes, notes_request
from tests.helpers.clinical_texts import TOPICS
from tests.helpers.http_server import serving
from tests.helpers.patients_page import EVIL, WHOLE, alone, answer, channels, contrast, paste, predict, visit

pytestmark = needs_browser
TEXT = "Doctor: how are you?\nPatient: I am fine, 𝒳🦠 penicillin, rash today. And well and fine."
MARKS = (
    "[...document.querySelectorAll('#words mark')].map(e => [Number(e.dataset.word), e.textContent, "
    "Number(e.dataset.weight), e.title, getComputedStyle(e).backgroundColor])"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A model of measurements, and one of texts."""
    path = tmp_path_factory.mktemp("notes")
    notes = export_notes(path, None, "task.longest=24", "task.explained=8", steps=50)
    tiny = export(path, small_trained(icu_cohort(), judged=0)).parent
    config = ServeConfig(checkpoint=str(tiny), clinical=str(notes))
    with serving(build_app(None, config, load_clinic(config)), lifespan="auto") as url:
        yield url


@pytest.fixture
def shown(seen, url):
    with alone(seen, url):
        yield seen


@pytest.mark.parametrize("explain", ["gradients", "attention"])
def test_words_are_highlighted_for_each_label(shown, url, explain):
    """The whole text stands there; each known word has the number of the reply, its colour and its words, for the
    likeliest label first and then for the one that is chosen."""
    (patient,) = answer(url, notes_request(TEXT), explain=explain)["patients"]
    (explanation,) = patient["explanations"]
    predict(
        shown, {"patients": notes_request(TEXT)["patients"]}
    )  # it names no model: the one that reads texts is asked
    assert shown.text("#words") == TEXT
    if explain == "attention":
        shown.click("#word-maps input[value='attention']")
        shown.wait("document.querySelector('#word-meaning').textContent.includes('not a cause')")
    assert explanation["faithfulness"] in shown.text("#word-meaning")
    assert shown.value("document.querySelector('#risk [aria-pressed=true]').dataset.label") == "ALLERGY"
    for label in ("ALLERGY", "LABS"):
        if label != "ALLERGY":
            shown.click(f"#risk [data-label='{label}']")
        (told,) = (each for each in explanation["labels"] if each["label"] == label)
        expected = {at: weight for at, weight in enumerate(told["weights"]) if weight is not None}
        marks = shown.value(MARKS)
        assert {at: pytest.approx(weight) for at, _, weight, _, _ in marks} == expected
        most = max(abs(weight) for weight in expected.values())
        for at, word, weight, title, colour in marks:
            assert word == patient["words"][at]["word"]
            assert label in title
            red, _, blue = channels(colour)
            if explain == "gradients":
                assert ("raises" in title) == (weight > 0)
                assert (red - blue) * (1 if weight > 0 else -1) >= -1, "orange raises, blue lowers"
                assert abs(weight) < most or abs(red - blue) > 40
            else:
                number = float(re.search(r"([\d.]+) % of the attention", title)[1])
                assert number == pytest.approx(weight * 100, abs=0.51)
        unknown = shown.value("[...document.querySelectorAll('#words .unknown')].map(e => e.textContent)")
        assert unknown == [word["word"] for word in patient["words"] if not word["known"]]
        listed = shown.value("[...document.querySelectorAll('#findings button')].map(e => e.textContent.slice(1))")
        largest = sorted(expected, key=lambda at: -abs(expected[at]))[: len(listed)]
        assert [each.split(" ")[0] for each in listed] == [patient["words"][at]["word"] for at in largest]
        assert f"the log odds of {label} against all other labels" in shown.text("#word-meaning")
    shown.click("#findings li:nth-child(1) button")
    assert shown.value("Number(document.activeElement.dataset.word)") == largest[0]


def test_labels_have_probability_interval_base_rate_and_definition(shown, url):
    request = notes_request(TEXT)
    (patient,) = answer(url, request)["patients"]
    card = httpx.get(f"{url}/v1/models/{NAME}").json()
    predict(shown, request)
    rows = shown.value(
        "[...document.querySelectorAll('#risk button')].map(e => [e.dataset.label, e.textContent, e.title])"
    )
    told = {each["label"]: each for each in patient["labels"]}
    assert [label for label, _, _ in rows] == sorted(TOPICS, key=lambda label: -told[label]["probability"])
    facts = {each["label"]: each for each in card["outcome"]["labels"]}
    for label, text, title in rows:
        assert title == facts[label]["definition"]
        number = float(re.search(r"([\d.]+) %95 % interval", text)[1])
        assert number == pytest.approx(100 * told[label]["probability"], abs=0.51)
        assert f"base rate {100 * facts[label]['base_rate']:.0f} %" in text
    assert facts["ALLERGY"]["definition"] in shown.text("#definition")
    assert "one temperature for all labels" in shown.text("#risk details")
    assert f"of {patient['text']['words']} words known" in shown.text("#risk")
    for each in (patient["input_digest"][:12], card["version"][:12], f"of {patient['text']['tokens']} tokens read"):
        assert each in shown.text("#fact-list")
    assert shown.value("document.querySelector('#figure').hidden")
    assert "For research only" in shown.text("#warning")


def test_a_cut_text_an_empty_one_and_markup(shown, url):
    """What was not read is said and set apart; too few words have no number; ids and texts stay text."""
    long = f"{TEXT} {EVIL}"
    request = notes_request(long, f"hm {EVIL}", "")
    request["patients"][1]["id"] = EVIL
    cut, few, _ = answer(url, request)["patients"]
    predict(shown, request)
    assert shown.text("#words") == long
    assert shown.text("#words .unread") == long[cut["text"]["read_until"] :]
    assert cut["text"]["cut_reason"] in shown.text("#cut")
    assert (
        shown.value("[...document.querySelectorAll('#patients small')].map(e => e.textContent)")[1:]
        == ["not enough data"] * 2
    )
    shown.click("#patients button:nth-child(2)")
    assert shown.text("#who") == f"Patient {EVIL}"
    assert shown.text("#risk .none") == "Not enough data"
    assert few["reasons"][0] in shown.text("#risk")
    assert shown.text("#words") == f"hm {EVIL}"
    assert shown.value("[document.querySelectorAll('#words mark, #risk button').length, reasons.hidden]") == [0, True]
    shown.click("#patients button:nth-child(3)")
    assert "the text has no word" in shown.text("#risk")
    assert shown.value("document.querySelector('#text').hidden")
    predict(shown, request_of(icu_cohort(), [2]))  # the other model, on the same page
    assert shown.value("[document.querySelector('#text').hidden, document.querySelector('#figure').hidden]") == [
        True,
        False,
    ]


def test_refusals_and_the_choice_of_a_model(shown, url):
    paste(shown, notes_request("a\x07b"))
    shown.click("#send")
    shown.wait("!document.querySelector('#problem').hidden")
    assert "control character U+0007 at character 1" in shown.text("#problem")
    assert "patients[0].text" in shown.text("#problem")
    shown.problems[:] = [each for each in shown.problems if "400" not in each]
    assert shown.value("[...document.querySelectorAll('#model option')].map(e => e.value)") == ["tiny", NAME]
    shown.value("(e => { e.value = 'notes'; e.dispatchEvent(new Event('change')); })(document.querySelector('#model'))")
    shown.click("#examples")
    made = json.loads(shown.value("document.querySelector('#request').value"))
    assert [set(each) for each in made["patients"]] == [{"id", "text"}] * 3
    shown.click("#send")
    shown.wait(WHOLE)
    assert shown.text("#who") == "Patient made-up 1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_legible_on_a_narrow_screen(shown, url, scheme):
    shown.media(scheme)
    visit(shown, url, 390, 844)
    predict(shown, notes_request(TEXT))
    assert shown.value("document.documentElement.scrollWidth") <= 390
    for _, word, _, _, colour in shown.value(MARKS):
        ink = channels(shown.value("getComputedStyle(document.querySelector('#words mark')).color"))
        assert contrast(ink, channels(colour)) >= 4.5, word
    shown.media("light")
