"""What a prediction looked at, word by word and label by label.

The log odds that are explained are the model's own, before calibration.
"""

from collections.abc import Sequence
from typing import Any

import torch

from attnzoo.clinical.evidence import ATTENTION, GRADIENTS
from attnzoo.clinical.explain_words import LabelLogit, TextWords, word_attention, word_gradients
from attnzoo.clinical.words import spans
from serve.clinical.notes.reader import NoteReader, Notes
from serve.workplace import Deadline

NAMES = {"gradients": GRADIENTS, "attention": ATTENTION}
TITLES = {
    "gradients": "What the log odds of a label are made of, beside those of a text of unknown words as long",
    "attention": "Where the model's attention lies: what was looked at, not what it did to the prediction",
}
SHARED = "; it is the same for all labels"


def words_of(reader: NoteReader, text: str) -> list[dict[str, Any]]:
    """The tokens that are read: where each begins and ends in the text, in characters, and whether the model knows
    it."""
    vocabulary, places = reader.trained.vocabulary, spans(text)[: reader.trained.longest]
    return [
        {"word": text[start:end], "start": start, "end": end, "known": vocabulary.knows(text[start:end])}
        for start, end in places
    ]


def explained(
    reader: NoteReader, notes: Notes, row: int, explain: str, labels: Sequence[str], deadline: Deadline
) -> dict[str, Any]:
    """One map of one patient: for each label a weight of every word of `words_of`; null for unknown ones, which have
    no part in it. Raises ValueError where the map cannot be computed."""
    trained, name = reader.trained, NAMES[explain]
    numbers = torch.tensor([trained.labels.index(label) for label in labels])
    length = int(notes.tensors[1][row])
    words_NL, lengths_N, *series = (
        tensor[row : row + 1].expand(len(numbers), *tensor.shape[1:]) for tensor in notes.tensors
    )
    cells_NTVC, hours_N = (*series, None, None)[:2]
    every = TextWords(words_NL[:, :length], lengths_N, numbers, cells_NTVC, hours_N)
    logit, found = LabelLogit(trained.model, before=deadline.check), []
    for rows in reader.blocks(len(numbers), length):
        deadline.check()
        some = every.rows(rows)
        drawn = word_gradients(logit, some) if explain == "gradients" else word_attention(trained.model, some)
        with_words = logit.without(some), logit.without(some, torch.ones_like(some.observed))
        values = zip(drawn.values_NTV[..., 0], some.observed[..., 0], *with_words, strict=True)
        found += [_of_label(drawn.signed, *one) for one in values]
    config, evidence = trained.model.config, trained.evidence
    verdict = None if evidence is None else evidence.maps.get(name)
    shared = explain == "attention" and (config.pooling == "shared" or config.labels == "none")
    of_what = "the log odds of {} against all other labels" if config.exclusive else "the log odds of {}"
    return {
        "name": name,
        "title": TITLES[explain] + (SHARED if shared else ""),
        "signed": explain == "gradients",
        "unit": "logit" if explain == "gradients" else "share",
        "faithful": None if verdict is None else verdict.beats_random,
        "faithfulness": (
            "Whether this map points at what the model uses was not measured for this model."
            if verdict is None
            else verdict.words
        ),
        "labels": [
            {"label": label, "explains": of_what.format(label), **one} for label, one in zip(labels, found, strict=True)
        ],
    }


def _of_label(
    signed: bool, values_L: torch.Tensor, known_L: torch.Tensor, whole: torch.Tensor, without: torch.Tensor
) -> dict[str, Any]:
    pairs = zip(values_L.tolist(), known_L.tolist(), strict=True)
    return {
        "log_odds": float(whole) if signed else None,
        "log_odds_without_words": float(without) if signed else None,
        "weights": [value if is_known else None for value, is_known in pairs],
    }
