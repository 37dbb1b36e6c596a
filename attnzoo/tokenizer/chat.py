"""Conversations as text: the chat templates of checkpoints, which are written in Jinja.

A template is a program from whoever made the checkpoint. It runs in a sandbox without access to Python's internals,
files or imports, and with bounds on its source, output, memory and time. Use templates of checkpoints, never of
requests.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnzoo.tokenizer.base import Tokenizer
from attnzoo.tokenizer.sourced import Sourced, written

if TYPE_CHECKING:
    from jinja2 import Template

    from attnzoo.tokenizer.sandbox import Sandbox

MAX_SOURCE = 256 << 10
"""Characters of a template; the largest in use have some 20,000."""
MAX_SECONDS = 2.0
MAX_LEVELS, MAX_QUOTED = 32, 500
ROLES = frozenset(["assistant", "developer", "function", "ipython", "model", "system", "tool", "user"])
"""Roles whose names count as the template's own words: templates spell `<|user|>` as '<|' + role + '|>'."""


class ChatTemplate:
    """One template, compiled once. Threads may share it.

    special: texts that templates read by name, such as bos_token and eos_token. Raises ValueError when Jinja2 is not
    installed, the template is too large or not valid.
    """

    def __init__(self, source: str, *, special: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are read")
        self.source, self.special = source, written(dict(special))
        self._sandbox, self._template = _compile(source)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template of a tokenizer, with its special tokens; None where it has none. Raises ValueError."""
        if tokenizer.chat_template is None:
            return None
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        special = {name: tokenizer.spelling(token) for name, token in ids.items() if token is not None}
        return cls(tokenizer.chat_template, special=special)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> Sourced:
        """The text of a conversation, special tokens included, with a mark on all characters that the template wrote.

        add_generation_prompt: end with the beginning of the assistant's answer. Raises ValueError with the template's
        own words where it refuses the conversation, and when it fails or goes beyond a limit.
        """
        from jinja2 import TemplateError

        from attnzoo.tokenizer.sandbox import DeadlineError, LimitError

        context = {
            **self.special,
            "messages": [_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._sandbox.run(self._template, context, MAX_SECONDS)
        except DeadlineError:
            raise ValueError(f"the chat template takes longer than {MAX_SECONDS} s; shorten the conversation") from None
        except LimitError as error:
            raise ValueError(f"the chat template is stopped at a limit: {error}; shorten the conversation") from None
        except Exception as error:
            kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            raise ValueError(f"the chat template refuses this conversation: {kind}{_quoted(error)}") from None


def _compile(source: str) -> "tuple[Sandbox, Template]":
    try:
        from attnzoo.tokenizer.sandbox import Sandbox
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in ("jinja2", "markupsafe"):
            raise
        raise ValueError(
            "this model has a chat template, and the package jinja2 is not installed; pip install 'attnzoo[weights]'"
        ) from None
    sandbox = Sandbox()
    try:
        return sandbox, sandbox.compile_source(source)
    except Exception as error:  # Jinja's own, or Python's when the code that Jinja writes nests too deep
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" (line {line})"
        raise ValueError(f"the chat template is not valid: {_quoted(error)}{where}; repair it in the model") from None


def _message(message: Any, where: str) -> Any:
    found = _plain(message, where, MAX_LEVELS)
    if isinstance(found, dict) and isinstance(found.get("role"), str) and found["role"] in ROLES:
        found["role"] = written(found["role"])
    return found


def _plain(value: Any, where: str, levels: int) -> Any:
    """A copy of JSON data, so that no template sees an object with attributes of its own."""
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a plain str, without the marks of `Sourced`
    if levels == 0:
        raise ValueError(f"{where} has more than {MAX_LEVELS} levels; flatten it")
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{where}.{key}", levels - 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{where}[{index}]", levels - 1) for index, part in enumerate(value)]
    raise ValueError(f"{where} is of type {type(value).__name__}; give text, numbers, lists and mappings")


def _quoted(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "..."
