"""What callers of `generate` want to read and edit of attention, planned for every prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from attnzoo.attention.edits import ALL, GENERATED, Edit, EditPlan, Edits, Item, TokenLayout
from attnzoo.models import DecoderLM, EmbeddedPrompt
from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.spans import token_spans

Spans = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""Names of parts of a prompt, or of each prompt: [start, stop) in tokens, several of these, or a text in the prompt."""


@dataclass(frozen=True)
class AttentionWish:
    """What is to be read and edited of attention while a text is generated. edits, read: in list order, edits first.
    spans: what the names in them mean, for each prompt: [start, stop) in tokens, several of these, or a text that
    stands in the prompt, with all of its tokens wherever it stands. In a chat, messages have names without it: "user",
    "messages[0]" and so on (`attnzoo.tokenizer.spans.message_spans`), and so have embeddings (`Embedded.name`); a name
    in `spans` takes precedence."""

    NAMES: ClassVar[tuple[str, ...]] = ("edits", "read", "spans")
    edits: Edits | Sequence[Item] = ()
    read: Edits | Sequence[Item] = ()
    spans: Spans = None

    @classmethod
    def taken_from(cls, options: Mapping[str, Any]) -> "tuple[AttentionWish, dict[str, Any]]":
        """(the wish in keyword options, the other options)."""
        rest = {name: value for name, value in options.items() if name not in cls.NAMES}
        return cls(**{name: value for name, value in options.items() if name in cls.NAMES}), rest

    @property
    def is_empty(self) -> bool:
        """Whether nothing is wished. Raises ValueError for what is no list of reads or edits."""
        return not _items(self.edits, "edits") and not _items(self.read, "read")

    def plans(
        self,
        model: DecoderLM,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        named: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[EditPlan] | None:
        """A plan for every prompt, None where nothing is wished. named: spans that each prompt has of itself. Raises
        ValueError as `DecoderLM.plan_edits`."""
        edits, reads = _items(self.edits, "edits"), _items(self.read, "read")
        for index, item in enumerate(reads):
            if isinstance(item, Edit):
                raise ValueError(f"read[{index}]={type(item).__name__}(...) is an edit; move it to edits")
        items = [*edits, *reads]
        if not items:
            if self.spans is not None:
                raise ValueError("spans name parts of a prompt for edits and read, and there are none; leave it out")
            return None
        spans = _spans(self.spans, len(prompts))
        plans = []
        for index, (ids, known, own, limit) in enumerate(
            zip(prompts, named or [{}] * len(prompts), spans, limits, strict=True)
        ):
            known = {**known, **(ids.spans if isinstance(ids, EmbeddedPrompt) else {})}
            found = {name: at for name, at in known.items() if name not in (ALL, GENERATED)}
            try:
                found |= {name: token_spans(tokenizer, ids, value, name) for name, value in (own or {}).items()}
                plans.append(model.plan_edits(Edits(*items), TokenLayout(len(ids), found), max(limit - 1, 0)))
            except ValueError as error:
                where = f"prompts[{index}]: " if len(prompts) > 1 else ""
                raise ValueError(where + _of_lists(str(error), len(edits))) from None
        return plans


def _spans(given: Any, prompts: int) -> Sequence[Mapping[str, Any] | None]:
    """One entry for each prompt. Raises ValueError for anything else."""
    if given is None or isinstance(given, Mapping):
        return [given] * prompts
    if not isinstance(given, list | tuple):
        raise ValueError(f"spans={given!r}: give a mapping of names, or a list of one for each prompt")
    if len(given) != prompts:
        raise ValueError(f"spans has {len(given)} entries for {prompts} prompts; give one each, or one for all")
    for index, own in enumerate(given):
        if own is not None and not isinstance(own, Mapping):
            raise ValueError(f"spans[{index}]={own!r}: give a mapping of names, or None")
    return given


def _of_lists(message: str, edits: int) -> str:
    """A message about the joined list with numbers of the two lists: of 2 edits, edits[2] is read[0]."""
    pattern = r"\bedits\[(\d+)\]"
    return re.sub(pattern, lambda at: at[0] if int(at[1]) < edits else f"read[{int(at[1]) - edits}]", message)


def _items(given: Any, name: str) -> Sequence[Any]:
    if isinstance(given, Edits):
        return given.items
    if isinstance(given, Item):
        return [given]
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValueError(f"{name}={given!r}: give Edits(...), or a list of reads and edits")
    return given
