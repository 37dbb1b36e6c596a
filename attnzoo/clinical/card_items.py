"""Answers the items of TRIPOD+AI for a clinical run: done, and where; not applicable, and why; or not done.

An item is done only where a card says all that it asks. What a run cannot know (ethics, funding, who the people are)
is not done until its author answers it in a file of answers.
"""

from collections.abc import Mapping

from attnzoo.clinical.card import DATA_CARD, ITEMS, MODEL_CARD, is_calibrated
from attnzoo.clinical.card_markdown import document, table
from attnzoo.clinical.run_facts import RunFacts
from attnzoo.clinical.tripod import ITEMS as ALL
from attnzoo.clinical.tripod import SOURCE

NOT_DONE = "not done"
KNOWN = {item.number: item for item in ALL}


def done(document_name: str, section: str) -> str:
    """An answer that names a section of a card."""
    return f"done at {document_name}, {section}"


def not_applicable(why: str) -> str:
    """An answer for what an item asks in vain."""
    return f"not applicable: {why}"


def partly(what: str) -> str:
    """An answer for an item of which a card says a part."""
    return f"{NOT_DONE}: {what}"


def answers(facts: RunFacts, given: Mapping[str, str] | None = None, source: str = "") -> dict[str, str]:
    """The answer to every item, by number. given: those of the author, from the file `source`; they come first where
    the run has none or only a part."""
    found = dict.fromkeys(KNOWN, NOT_DONE) | _always(facts.of_row) | _of_files(facts)
    for number, text in (given or {}).items():
        found[number] = f"done at {source}: {text}"
    return found


def _always(row: str) -> dict[str, str]:
    research = "the model is meant for research alone, and has no place in care"
    no_evaluation = "nothing was evaluated on other data than the data set's own"
    return {
        "1": partly(f"{MODEL_CARD} names outcome and model in its title, but not for whom it is"),
        "3b": not_applicable(research),
        "4": done(MODEL_CARD, "What it is"),
        "5a": partly(f"{DATA_CARD}, Source names the data set; why it was taken, and whom it represents, is unknown"),
        "6b": partly(f"{DATA_CARD}, Left out counts what the reader left out"),
        "7": done(DATA_CARD, "Preparation"),
        "8a": partly(f"{MODEL_CARD}, Outcome names the label; how and when it was assessed is unknown"),
        "10": partly(
            f"{DATA_CARD}, Parts: all {row}s with a label were taken; whether they suffice was not calculated"
        ),
        "11": done(DATA_CARD, "Missing values"),
        "12a": done(DATA_CARD, "Parts"),
        "12c": partly(f"{MODEL_CARD}, Training has kind, values and selection; how the values were found is unknown"),
        "12e": partly(f"{MODEL_CARD}, Figures names the measures; there are no figures of calibration or benefit"),
        "12g": done(MODEL_CARD, "How to predict with it"),
        "13": done(MODEL_CARD, "Training"),
        "15": done(MODEL_CARD, "Output"),
        "16": not_applicable(no_evaluation),
        "18f": done(MODEL_CARD, "Versions"),
        "20c": not_applicable(no_evaluation),
        "22": done(MODEL_CARD, "Files"),
        "23a": partly(f"{MODEL_CARD}, Figures are of the part that selected, without intervals"),
        "26": done(MODEL_CARD, "Limits"),
    }


def _of_files(facts: RunFacts) -> dict[str, str]:
    """Items whose answer depends on what the run has written."""
    found: dict[str, str] = {}
    if facts.statistics:
        found |= {number: done(DATA_CARD, "Variables") for number in ("9a", "9b")}
        found |= {"12b": done(DATA_CARD, "Preparation and Variables"), "27a": done(MODEL_CARD, "Input")}
    elif facts.reads_texts:
        found |= {"12b": done(DATA_CARD, "Preparation and Variables")}
        found |= {"9b": partly(f"{DATA_CARD}, Variables has the words that are read, but not who wrote them and when")}
    if facts.data.get("parts"):
        found |= {number: done(DATA_CARD, "Parts") for number in ("20a", "21")}
        if not any("labels" in told for told in facts.data["parts"].values()):
            found |= {
                number: partly(f"{DATA_CARD}, Parts has {facts.of_row}s, but no events") for number in ("20a", "21")
            }
    if facts.statistics and facts.data.get("missing"):
        found["20b"] = partly(f"{DATA_CARD}, Variables and Missing values; there are no dates")
    if is_calibrated(facts):
        found |= {number: done(MODEL_CARD, "Calibration") for number in ("12f", "24")}
    else:
        found |= {number: not_applicable("the model was not updated after training") for number in ("12f", "24")}
    return found


def items_card(facts: RunFacts, given: Mapping[str, str] | None = None, source: str = "") -> str:
    """The items and their answers as a Markdown file."""
    found = answers(facts, given, source)
    states = [text.split(" at ")[0].split(":")[0] for text in found.values()]
    told = ", ".join(f"{states.count(state)} {state}" for state in ("done", "not applicable", NOT_DONE))
    rows = [(item.number, item.section, item.asks, found[item.number]) for item in ALL]
    return document(
        f"TRIPOD+AI: {facts.outcome}, the run {facts.row.get('name', facts.directory.name)}",
        {
            "What this is": f"27 items, with their parts {len(ALL)}: {told}. Source: {SOURCE}. An item is done only "
            "where a card says all that it asks; what a run cannot know, its author answers in a file "
            f"(`attnzoo card RUN --answers FILE`). Nothing in {ITEMS} was judged by a person.",
            "Items": table(("item", "of", "asks for", "answer"), rows),
        },
    )
