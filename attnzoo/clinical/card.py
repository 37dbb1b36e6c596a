"""Writes what a clinical run says of itself as Markdown: a model card and a data card, with nothing that it does not
say. `attnzoo.clinical.card_items` answers the items of TRIPOD+AI from the same facts."""

import inspect
import sys
from typing import Any

from attnzoo.clinical.card_markdown import document, options, table
from attnzoo.clinical.card_reading import input_of, missing_of, preparation_of, variables_of
from attnzoo.clinical.formats import FORMATS
from attnzoo.clinical.run_facts import UNKNOWN, RunFacts
from attnzoo.report import counted, format_value

MODEL_CARD, DATA_CARD, ITEMS = "model-card.md", "data-card.md", "tripod-ai.md"
NAMES = (MODEL_CARD, DATA_CARD, ITEMS)


# --- model card -------------------------------------------------------------------------------------------------


def model_card(facts: RunFacts) -> str:
    """The model card of a run."""
    row = facts.row
    return document(
        f"Model card: {facts.outcome}, predicted by the run {row.get('name', facts.directory.name)}",
        {
            "What it is": _kind(facts),
            "Intended use": "Research on methods of prediction: to repeat the run, to compare models, to try them on "
            "other data.",
            "Not for": "Decisions about patients: the run was not evaluated for that. Not for other variables, units "
            "or hours than those of data-card.md.",
            "Outcome": _outcome(facts),
            "Output": _output(facts),
            "Input": input_of(facts),
            "Training": _training(facts),
            "Figures": _figures(facts),
            "Calibration": _calibration(facts),
            "Explanations": _explanations(facts),
            "Limits": _limits(facts),
            "How to predict with it": f"{_call(facts)}, with a cohort of `attnzoo.clinical.formats.load_cohort`.",
            "Versions": _versions(facts),
            "Files": table(("file", "SHA-256"), facts.digests.items()),
        },
    )


def _kind(facts: RunFacts) -> str:
    task, beside = facts.section("task"), ""
    if facts.reads_sensors:
        named = facts.export["language_model"]
        beside = (
            f"It stands in front of a frozen language model, `{named['checkpoint']}` in {named['dtype']} (digest "
            f"{named['digest']}), whose weights are none of these. "
        )
    return (
        f"The development of a prediction model: `task.kind` {task.get('kind', UNKNOWN)}, format of the export "
        f"{facts.export.get('format', UNKNOWN)}, {format_value(facts.row.get('parameters', 0))} weights. {beside}"
        "It has not been evaluated on other data in this run."
    )


def _call(facts: RunFacts) -> str:
    """What predicts with this kind of model, in Python."""
    module, function = "trained", "load_trained"
    if facts.reads_texts:
        module, function = "trained_ldam", "load_ldam"
    if facts.reads_sensors:
        module, function = "trained_sensors", "load_sensors"
    return f"`{function}({str(facts.directory)!r}).predict(cohort)` of `attnzoo.clinical.{module}`"


def _outcome(facts: RunFacts) -> str:
    told = dict(facts.export.get("outcome") or {})
    lines = [f"Label of the data set: {facts.outcome}."]
    if told.get("edges"):
        lines.append(f"In buckets that end at {', '.join(f'{edge:g}' for edge in told['edges'])}, in the label's unit.")
    if told:
        lines.append("Predicted anew every hour." if told.get("hourly") else f"Predicted once for each {facts.of_row}.")
    reader = reader_of(facts)
    return "\n\n".join([*lines, f"How and when it was assessed: {UNKNOWN}. {reader}".strip()])


def _output(facts: RunFacts) -> str:
    told = dict(facts.export.get("outcome") or {})
    if told.get("edges"):
        return "A probability of each bucket; the bucket that is told is the median. There is no threshold to act on."
    return "A probability of each label. There is no threshold to act on."


def _training(facts: RunFacts) -> str:
    row, steps = facts.row, [int(record["step"]) for record in facts.evaluations if "step" in record]
    return "\n\n".join(
        [
            f"{_steps(row.get('steps', UNKNOWN))}, complete: {row.get('complete', UNKNOWN)}. The loss "
            "weighs all labels alike: no class weights, no resampling.",
            *_began(facts),
            f"Selection: {_selection(facts)}; {counted(len(steps), 'evaluation')} in metrics.jsonl.",
            f"How the values below were found: {UNKNOWN}.",
            *(
                f"`{name}`:\n\n{options(facts.section(name))}"
                for name in ("model", "optim", "schedule", "train")
                if facts.section(name)
            ),
        ]
    )


def _began(facts: RunFacts) -> list[str]:
    """Where the weights come from that training began with, if another run learned them."""
    first = facts.section("checkpoint").get("init_from")
    if first is None:
        return []
    return [f"It began with the weights of `{first}` (`checkpoint.init_from`), learned from the same training part."]


def _steps(steps: Any) -> str:
    return counted(steps, "step") if isinstance(steps, int) else f"steps: {steps}"


def _selection(facts: RunFacts) -> str:
    """What was exported, which need not be as many weights as `eval.keep_best` asks for."""
    keep, steps = facts.section("eval").get("keep_best"), facts.row.get("selected_steps")
    if not keep:
        return "the last weights"
    asked = f"those with the best figures on the inner validation part, at most {keep} (`eval.keep_best`)"
    if steps is None:
        return f"the mean of the weights after some evaluations, {asked}; after which steps is {UNKNOWN}"
    after = f"after step {steps[0]}" if len(steps) == 1 else f"after steps {', '.join(map(str, steps))}, their mean"
    return f"the weights {after}: {asked}"


def _figures(facts: RunFacts) -> str:
    told = dict(facts.export["metadata"])
    served = dict(told.pop("as_served", None) or {})
    figures = {key: value for key, value in told.items() if key not in ("steps", "name")}
    if not figures:
        return UNKNOWN
    where = (
        "On the inner validation part, which selected the weights, so that they flatter; without intervals, and not by "
        "group."
    )
    if not served:
        how = "The model before its calibration" if is_calibrated(facts) else "The model as it is served"
        return f"{where} {how}:\n\n" + table(("measure", "value"), figures.items())
    rows = [(name, value, served.get(name, "")) for name, value in figures.items()]
    how = "The calibration below was fitted on the same rows, which flatters the served model's once more:"
    return f"{where} {how}\n\n" + table(("measure", "before calibration", "as served, calibrated"), rows)


def _fits(facts: RunFacts) -> dict[str, tuple[Any, str | None]]:
    """By what is calibrated: the fit, None where none is applied, and why."""
    fitted, evidence = facts.export.get("calibration"), dict(facts.export.get("evidence") or {})
    if fitted and "calibrators" in fitted:  # of several labels
        names = ["all labels"] if fitted["exclusive"] else facts.export["labels"]
        why = fitted.get("refused") or [None] * len(names)
        return {name: (one, no) for name, one, no in zip(names, fitted["calibrators"], why, strict=True)}
    return {"": (fitted or None, evidence.get("uncalibrated"))}


def is_calibrated(facts: RunFacts) -> bool:
    """Whether predictions of the run's export are calibrated, of several labels at least one."""
    return any(one is not None for one, _ in _fits(facts).values())


def _calibration(facts: RunFacts) -> str:
    fits = _fits(facts)
    if not is_calibrated(facts):
        reasons = list(dict.fromkeys(why for _, why in fits.values() if why is not None))
        return " ".join(
            ["None is applied. Predictions have no interval."] + [f"It was refused: {one}." for one in reasons]
        )
    if "" in fits:
        told = fits[""][0]
    else:
        told = {
            name: one if one is not None else f"as the model tells it{f' ({why})' if why else ''}"
            for name, (one, why) in fits.items()
        }
    return f"Fitted on the inner validation part and applied by `predict`:\n\n{options(told)}"


def _explanations(facts: RunFacts) -> str:
    maps = dict((facts.export.get("evidence") or {}).get("maps") or {})
    if not maps:
        return "Whether they point at what the model uses was not measured (`task.explained`)."
    return "\n".join(f"- {one['words']}" for one in maps.values())


def _limits(facts: RunFacts) -> str:
    split = facts.export["split"]
    lines = [
        "- One run on one split. Its test part was not looked at in training.",
        "- No data of another place or time than the data set's own.",
        "- The figures above are of the part that selected.",
    ]
    if split.get("split") == "stay":
        row = facts.of_row
        lines.append(f"- Split by {row}: {row}s of one patient may be in several parts, which flatters.")
    if split.get("split") == "time":
        lines.append("- Split in time: the same patients may be in all parts. Of other patients nothing is known.")
    if facts.row.get("complete") is False:
        lines.append("- The run was stopped before its last step.")
    return "\n".join(lines)


def _versions(facts: RunFacts) -> str:
    report = facts.report
    command = " ".join(map(str, report.get("command", [])))
    told = {name: report.get(name, UNKNOWN) for name in ("commit", "seed", "device")}
    return f"Command: `{command or UNKNOWN}`\n\n{options({**told, **dict(report.get('versions', {}))})}"


# --- data card --------------------------------------------------------------------------------------------------


def data_card(facts: RunFacts) -> str:
    """The data card of a run."""
    return document(
        f"Data card: {facts.export['data'].get('cohort', UNKNOWN)}",
        {
            "Source": _source(facts),
            "People": f"Who they are, where and when they were treated, who was eligible, consent: {UNKNOWN}.",
            "Parts": _parts(facts),
            "Variables": variables_of(facts),
            "Missing values": missing_of(facts),
            "Preparation": preparation_of(facts),
            "Left out": _left_out(facts),
        },
    )


def reader_of(facts: RunFacts) -> str:
    """What the head of the data format's file says of it; empty for a format that is not known here."""
    name = facts.export["data"].get("format")
    if name not in FORMATS:
        return ""
    text = inspect.cleandoc(sys.modules[FORMATS.get(name).__module__].__doc__ or "")
    return f"The reader of the format `{name}` says: {' '.join(text.split())}"


def _source(facts: RunFacts) -> str:
    told = {**facts.export["data"], "path": facts.section("data").get("path", UNKNOWN)}
    return f"{options(told)}\n\n{reader_of(facts)}"


def _parts(facts: RunFacts) -> str:
    parts = facts.data.get("parts")
    split = f"The split:\n\n{options(facts.export['split'])}"
    if "content" not in facts.export["split"]:
        split += f"\n- digests of the values: {UNKNOWN}"
    if not parts:
        return f"{facts.of_row.capitalize()}s and events of each part: {UNKNOWN}.\n\n{split}"
    columns = list(dict.fromkeys(key for told in parts.values() for key in told))
    rows = [[name, *(told.get(column, "") for column in columns)] for name, told in parts.items()]
    named = [f"{facts.of_row}s" if column == "stays" else column for column in columns]
    return f"{table(('part', *named), rows)}\n\n{split}"


def _left_out(facts: RunFacts) -> str:
    left = {reason: count for reason, count in (facts.data.get("left_out") or {}).items() if count}
    return table(("what", "how many"), left.items()) if left else "The reader counted nothing that it left out."
