"""What a model reads, as its cards tell it: series on a grid of hours or days, texts, or numbers of daily sensors.

Each kind of model prepares its input in a way of its own, and deals with what is missing in a way of its own; a card
that told one way of all would be wrong about the others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from attnzoo.clinical.card_markdown import table
from attnzoo.clinical.run_facts import UNKNOWN, RunFacts
from attnzoo.clinical.statistics import GAP_HOURS, LARGEST
from attnzoo.clinical.variables import STATICS, VARIABLES

PLAUSIBLE = (
    "A value outside a variable's possible range is dropped, one outside its plausible range is clipped; an unknown "
    "unit is refused and counted."
)
Number = tuple[str, str, float, float, str]
"""(name of the number, of the variable that it comes from, mean, deviation, scale)."""


def input_of(facts: RunFacts) -> str:
    """What the model is given, and when that is too little."""
    lines = []
    if facts.reads_texts:
        lines.append(_text_input(facts))
    if facts.reads_sensors:
        lines.append(
            "Mean and variance of each sensor over the days on which it was measured. The model is not told on how "
            "many that was, and there is no least number of them."
        )
    if facts.reads_series:
        lines.append(
            "Cells that were not measured are input: the model is told that they were not. Nothing is imputed."
        )
    least = facts.statistics.get("least_coverage")
    if least is not None:
        lines.append(
            f"Least coverage: in 99 % of training {facts.of_row}s at least {100 * least:.2f} % of the cells were "
            "measured; below that there is not enough data to predict from."
        )
    return "\n\n".join(lines) or f"Measured variables: {UNKNOWN}."


def _text_input(facts: RunFacts) -> str:
    read = (
        f"The first {facts.export['longest']:,} words, digits and marks of punctuation of a text; the rest is not read."
    )
    evidence = dict(facts.export.get("evidence") or {})
    if "least_known" not in evidence:
        return f"{read} How many known words are too few: {UNKNOWN}."
    return (
        f"{read} Of texts of the inner validation part 99 % have at least {evidence['least_known']} words that the "
        f"model knows, and in 99 % these are at least {evidence['least_share']:.0%} of all words; below either there "
        "is not enough data to predict from."
    )


def variables_of(facts: RunFacts) -> str:
    """The predictors, with what the training part says of them."""
    parts = []
    if facts.reads_texts:
        parts.append(_words(facts))
    if facts.statistics:
        about = (
            f"All that the reader gave or `data.variables` chose, told by the {facts.step}. Mean and deviation are "
            "those of measured cells of the training part, on the scale named; both are 0 where nothing was measured."
        )
        if facts.reads_sensors:
            about = (
                "Mean and variance over the days before of all sensors that the reader gave or `data.variables` chose. "
                "Unit and plausible range are those of a day's value. Mean and deviation in training are those of the "
                f"{facts.of_row}s on which the number is known."
            )
        parts.append(f"{about}\n\n{_table_of(facts)}")
    return "\n\n".join(parts) or f"Measured variables: {UNKNOWN}."


def _words(facts: RunFacts) -> str:
    known = int(facts.export["model"]["vocab_size"]) - 1
    return (
        f"The text: {known:,} words in lower case (export/vocabulary.json), those of enough training texts "
        "(`task.least`) and of the labels' definitions. Every other word is one unknown word."
    )


def _table_of(facts: RunFacts) -> str:
    rows = []
    for name, source, mean, deviation, scale in _numbers(facts):
        about = VARIABLES.get(source) or STATICS.get(source)
        told = (about.meaning, about.unit, f"{about.plausible[0]:g} to {about.plausible[1]:g}") if about else ("",) * 3
        rows.append((name, *told, mean, deviation, scale))
    return table(("variable", "meaning", "unit", "plausible", "mean in training", "deviation", "scale"), rows)


def _numbers(facts: RunFacts) -> Iterator[Number]:
    fitted = facts.statistics
    if facts.reads_sensors:
        for name, mean, deviation in zip(fitted["names"], fitted["means"], fitted["deviations"], strict=True):
            yield name, name.rpartition(" ")[0], mean, deviation, "as it is"
        return
    columns = (fitted["variables"], fitted["means"], fitted["deviations"], fitted["logged"])
    for name, mean, deviation, is_logged in zip(*columns, strict=True):
        yield name, name, mean, deviation, "log(1 + x)" if is_logged else "as it is"
    if not facts.reads_texts:  # models of texts read no facts of admission
        statics = (fitted["static_names"], fitted["static_means"], fitted["static_deviations"])
        for name, mean, deviation in zip(*statics, strict=True):
            yield name, name, mean, deviation, "as it is"


def missing_of(facts: RunFacts) -> str:
    """What is done about missing values, and how many there are."""
    parts = []
    if facts.reads_texts:
        parts.append("A text that is empty stays empty; nothing is written in its place.")
    if facts.reads_sensors:
        parts.append(
            "Days without a value do not count in a sensor's mean and variance. A sensor without any value has the "
            "mean of the training part, and the model is not told that it was missing."
        )
    if facts.reads_series:
        parts.append(
            "A step of the grid without a value is told as that (a value of 0 with `measured` 0); nothing is imputed."
        )
    handling = " ".join(parts)
    shares = facts.data.get("missing")
    if not shares:
        of_texts = facts.reads_texts and not facts.reads_series
        return handling if of_texts else f"{handling}\n\nShares of each variable: {UNKNOWN}.".strip()
    rows = [(name, share["hours"], share["stays"]) for name, share in shares.items()]
    columns = ("variable", "steps without a value", f"{facts.of_row}s without any")
    return f"{handling} Shares in the training part:\n\n{table(columns, rows)}"


def preparation_of(facts: RunFacts) -> str:
    """How what the reader gave becomes input, and what became of the values."""
    counts: Mapping[str, Mapping[str, Any]] = facts.data.get("values") or {}
    lines = []
    if facts.reads_texts:
        lines.append(
            "Texts are cut into words, digits and marks of punctuation, in lower case, of which the first "
            f"{facts.export['longest']:,} are read (`task.longest`). Nothing else is done to them."
        )
    if facts.reads_sensors:
        lines += [
            PLAUSIBLE,
            "Means and variances are standardised by mean and deviation of the training part and clipped to "
            f"{LARGEST:g} deviations.",
        ]
    if facts.reads_series:
        lines += [
            f"Values of {'an' if facts.step == 'hour' else 'a'} {facts.step}: the last one, and how many there were. "
            f"{PLAUSIBLE}",
            "Values are standardised by mean and deviation of the training part and clipped to "
            f"{LARGEST:g} deviations; counts as log(1 + n); time since the last value as a share of {GAP_HOURS} "
            f"{facts.step}s.",
        ]
    if counts:
        columns = list(dict.fromkeys(key for told in counts.values() for key in told))
        lines.append(
            table(
                ("values of", *columns), ([name, *(told.get(c, 0) for c in columns)] for name, told in counts.items())
            )
        )
    return "\n\n".join(lines)
