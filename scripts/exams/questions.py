"""Multiple-choice questions from a file, and the prompts that are made of them."""

import ast
import csv
import io
import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnzoo.errors import suggest
from attnzoo.files import read_text, unique_keys
from attnzoo.texts import is_blank

GROUP = "domain"
"""The column of groups where none is named; a file need not have it."""
COLUMNS = ("question", "choices", "answer")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = re.compile(r"\(?([A-Z])\)?")
FIRST_OPTION = re.compile(r"^\s*\(?A[.):]", re.MULTILINE)

REASON = """Think step by step. Then end with a line that holds the letter of the right option, like this:
<answer>(LETTER)</answer>"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """stem: the question without its options. options: by letter, A first. answer: the right letter. group: for example
    the subject; results are also given by group. letters: the original letter of each option, where the order has been
    changed."""

    id: str
    stem: str
    options: Mapping[str, str]
    answer: str
    group: str = ""
    letters: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question with its options, one a line."""
        return "\n".join([self.stem, *(f"({letter}) {option}" for letter, option in self.options.items())])

    def prompt(self) -> str:
        """Asks for reasoning and for an answer that can be read (`scripts.exams.answers.read_letter`)."""
        return f"{self.text}\n\n{REASON}"

    def beginning(self) -> str:
        """A text whose next token is the letter of the answer, for models that only continue texts."""
        return f"Question: {self.text}\nAnswer: ("

    def original(self, letter: str) -> str:
        """The letter that this option had in the file."""
        return self.letters[list(self.options).index(letter)] if self.letters else letter

    def reordered(self, order: int, seed: int) -> "Question":
        """The same question with its options in another order; order 0 is that of the file. Raises ValueError where the
        question has fewer orders than that."""
        names = list(self.options)
        orders = 1
        for factor in range(2, len(names) + 1):
            orders *= factor
        if order >= orders:
            raise ValueError(
                f"question {self.id!r} has {orders} orders of its options, and orders={order + 1} asks for more; give "
                f"{orders} or fewer"
            )
        if order == 0:
            return self
        draw, seen = random.Random(f"{seed}:{self.id}"), {tuple(names)}
        while len(seen) <= order:
            shuffled = tuple(draw.sample(names, len(names)))
            newest = shuffled if shuffled not in seen else None
            seen.add(shuffled)
        assert newest is not None
        options = {letter: self.options[old] for letter, old in zip(names, newest, strict=True)}
        return replace(self, options=options, letters=newest, answer=names[newest.index(self.answer)])


def read_questions(path: Path, group: str = GROUP) -> list[Question]:
    """The questions of a csv or jsonl file.

    A row has `question`, `choices` (an object from letters to texts, or a list) and `answer` (a letter); `id` and the
    column `group` may follow. Options that stand in the question's text as well, from a line that begins with (A), are
    left out of the stem. Raises ValueError that names the file and the row.
    """
    text = read_text(path).removeprefix("\ufeff")
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = _cells(text, path)
    elif path.suffix == ".jsonl":
        rows = [_object(line, f"'{path}' line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        raise ValueError(f"'{path}' must be a .csv or a .jsonl file")
    if not rows:
        raise ValueError(f"'{path}' holds no question")
    if group != GROUP and not any(group in row for row in rows):
        columns = sorted({str(name) for row in rows for name in row})
        raise ValueError(f"--group={group!r}: '{path}' has no such column{suggest(group, columns)}")
    found = [_question(row, n, f"'{path}' question {n}", group) for n, row in enumerate(rows, 1)]
    names = [question.id for question in found]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise ValueError(f"'{path}': the id {again!r} stands twice")
    return found


def _cells(text: str, path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv file by column. Raises ValueError for a name that two columns have, and for more cells than
    columns."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise ValueError(f"'{path}' is not a table of comma-separated values ({error})") from None
    again = next((name for name in columns if columns.count(name) > 1), None)
    if again is not None:
        raise ValueError(f"'{path}': the column {again!r} stands twice; keep one of them")
    for number, row in enumerate(rows, 1):
        if None in row:  # where csv puts cells without a column
            raise ValueError(f"'{path}' question {number} has more cells than the {len(columns)} columns")
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, not an object")
    return found


def _question(row: Mapping[str, Any], number: int, where: str, group: str) -> Question:
    missing = [name for name in COLUMNS if row.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}; a question has {', '.join(COLUMNS)}")
    options = _options(row["choices"], where)
    letter = LETTER.fullmatch(str(row["answer"]).strip())
    if letter is None or letter[1] not in options:
        raise ValueError(f"{where}: answer {row['answer']!r} is none of its options {', '.join(options)}")
    stem = _text(row["question"], "question", where)
    inside = FIRST_OPTION.search(stem)
    stem = stem[: inside.start()].strip() if inside else stem
    if is_blank(stem):
        raise ValueError(f"{where} has no text before its options")
    return Question(
        id=_text(number if row.get("id") in (None, "") else row["id"], "id", where),
        stem=stem,
        options=options,
        answer=letter[1],
        group=_text("" if row.get(group) is None else row[group], group, where),
    )


def _text(value: Any, what: str, where: str) -> str:
    """A text or a number as a text. Raises ValueError, also for yes and no, of which nobody knows how the file's author
    would write them."""
    if isinstance(value, bool):
        raise ValueError(f"{where}: {what} is {value}, not a text; write it in quotes")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {what} is {value}, not a number that there is; write it in quotes")
    try:
        if isinstance(value, str | int | float):
            return str(value).strip().encode("utf-8").decode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {what} holds half a surrogate pair, which is no text; remove it") from None
    raise ValueError(f"{where}: {what} is {value!r}, not a text")


def _options(choices: Any, where: str) -> dict[str, str]:
    """By letter, A first. Text is read as JSON, else as a Python literal. Raises ValueError."""
    if isinstance(choices, str):
        try:
            choices = _literal(choices)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{where}: choices are neither a JSON object nor a list") from None
    if isinstance(choices, list):
        choices = dict(zip(LETTERS, choices, strict=False)) if len(choices) <= len(LETTERS) else {}
    if not isinstance(choices, dict) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: choices must be 2 to {len(LETTERS)} options, by letter or as a list")
    found = {}
    for name, text in choices.items():
        letter = LETTER.fullmatch(str(name).strip())
        shown = _text(text, f"option {name!r}", where)
        if letter is None or is_blank(shown) or letter[1] in found:
            raise ValueError(f"{where}: option {name!r} must have a letter and a text, and no other that letter")
        found[letter[1]] = shown
    if sorted(found) != list(LETTERS[: len(choices)]):
        raise ValueError(f"{where}: options have the letters {', '.join(found)}, not A to {LETTERS[len(choices) - 1]}")
    first: dict[str, str] = {}
    for name, text in sorted(found.items()):
        if text in first:
            raise ValueError(
                f"{where}: the options {first[text]} and {name} are the same text {text!r}; keep one of them"
            )
        first[text] = name
    return dict(sorted(found.items()))


def _literal(text: str) -> Any:
    """JSON, else a Python literal. Raises ValueError and others for neither, and for a key that stands twice."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError:
        tree = ast.parse(text.strip(), mode="eval").body
    found = ast.literal_eval(tree)
    if isinstance(found, dict) and isinstance(tree, ast.Dict) and len(found) < len(tree.keys):
        raise ValueError("a key stands twice")
    return found
