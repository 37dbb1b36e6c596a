"""The environment that chat templates run in: Jinja's immutable sandbox, with bounds on time and memory.

Jinja's sandbox keeps a template from Python's internals; it allows `'x' * 10**10` and endless loops. Here

- a trace function in the rendering thread ends the template at the first line after a deadline; - the result of every
operation (an operator, `~`, a literal, a method, a filter, a captured block) is measured: before the operation where it
can multiply its operands, after it where it can only add to them.

So no value is larger than `MAX_CHARS`, nested values included: a list that holds another one twice, forty levels deep,
is small until it is printed or compared. Every constant of a template is marked as its own
(`attnzoo.tokenizer.sourced`), so that the result tells apart what the template wrote and what it was given. Import this
module only where Jinja2 is installed.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import update_wrapper
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, markup_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace, pass_eval_context

from attnzoo.tokenizer.guard import MAX_CHARS, MAX_TOTAL, Guard, LimitError
from attnzoo.tokenizer.sourced import Sourced, inherit, join, written

FOLD_CHARS, FOLD_TOTAL = 1 << 16, 1 << 20
"""Bounds for constants that Jinja computes while it compiles; larger ones are left for the rendering."""
MAX_DATE_FORMAT = 256
HTML_FILTERS = ("filesizeformat", "forceescape", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters left out: chat templates have no use for them, and `random` would make a prompt depend on chance."""
REFUSED_METHODS = frozenset(["encode", "expandtabs", "from_bytes", "maketrans", "to_bytes", "translate"])
TRACED = (os.path.dirname(jinja2.__file__) + os.sep, "<template>")
"""Files whose lines are checked against the deadline: a finaliser of anything else would swallow the exception."""


class DeadlineError(BaseException):
    """The time limit has passed. Not an Exception: nothing between template and `Sandbox.run` may catch it."""


def watch(deadline: float) -> Callable[..., Any]:
    """A trace function that raises DeadlineError at the template's first line after `deadline` (time.perf_counter)."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and time.perf_counter() > deadline:
            raise DeadlineError
        return trace if frame.f_code.co_filename.startswith(TRACED) else None

    return trace


class MeasuringCode(CodeGenerator):
    """Compiles templates so that every value that Jinja makes is measured, and the template's own texts are marked."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        value = node.as_const(frame.eval_ctx)
        if type(value) in (str, list, tuple, dict):
            self.write(f"environment.written({value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:  # noqa: N802
        self.write("environment.written(")
        super().visit_TemplateData(node, frame)
        self.write(")")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.written({super()._output_const_repr(group)})"

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        escape = "context.eval_ctx.volatile" if frame.eval_ctx.volatile else repr(bool(frame.eval_ctx.autoescape))
        self.write(f"environment.concatenated({escape}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._measured(node, frame, super().visit_List)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._measured(node, frame, super().visit_Dict)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._measured(node, frame, super().visit_Tuple)
        else:
            super().visit_Tuple(node, frame)

    def _measured(self, node: Any, frame: Frame, visit: Callable[[Any, Frame], None]) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and runs templates as model hubs write them. Threads may share one."""

    code_generator_class = MeasuringCode
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
        self._rendering = threading.local()
        self.filters |= {"join": _join, "tojson": _tojson}
        kept = {name: function for name, function in self.filters.items() if name not in HTML_FILTERS}
        self.filters = {name: self._guarded(name, function) for name, function in kept.items()}
        self.globals.pop("lipsum")
        self.globals |= {
            "dict": _dict,
            # A function, not a partial, whose arguments a template could read.
            "namespace": lambda *args, **kwargs: MeasuredNamespace(self, *args, **kwargs),
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @property
    def guard(self) -> Guard:
        """The bounds of what this thread compiles or renders."""
        guard: Guard = self._rendering.guard
        return guard

    def compile_source(self, source: str) -> Template:
        """The template of a source. Raises what Jinja raises, and what Python raises for the code that Jinja writes."""
        self._rendering.guard = Guard(FOLD_CHARS, FOLD_TOTAL)
        return self.from_string(source)

    def run(self, template: Template, context: Mapping[str, Any], seconds: float) -> Sourced:
        """The rendered text, with a mark on all characters that the template wrote.

        Raises DeadlineError, LimitError, and whatever the template raises."""
        self._rendering.guard = Guard(MAX_CHARS, MAX_TOTAL)
        before = sys.gettrace()
        parts, size = [], 0
        sys.settrace(watch(time.perf_counter() + seconds))
        try:
            for part in template.generate(context):
                size += len(part)
                if size > MAX_CHARS:
                    raise LimitError(f"its output is larger than {MAX_CHARS} characters")
                parts.append(part)
        finally:
            sys.settrace(before)
        return join(parts)

    # What compiled templates call.

    def made(self, value: Any) -> Any:
        """A literal, measured."""
        return self.guard.made(value)

    def written(self, value: Any) -> Any:
        """A constant, as the template's own."""
        return written(value)

    def concatenated(self, escape: bool, parts: tuple[Any, ...]) -> str:
        """`a ~ b`."""
        self.guard.joined(parts)
        text: str = self.guard.made((markup_join if escape else join)(parts))
        return text

    def concat(self, parts: list[str]) -> str:  # type: ignore[override]
        """The text of a macro or a captured block."""
        self.guard.room(sum(map(len, parts)))
        text: str = self.guard.made(join(parts))
        return text

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.guard.operands(operator, left, right)
        result = self.guard.made(super().call_binop(context, operator, left, right))
        return inherit(result, left, right) if operator == "%" else result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        guard = __self.guard
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = guard.method(name, owner, args, kwargs)
        if isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            guard.measure(args)
            guard.measure([value for key, value in kwargs.items() if not key.startswith("_")])
        result = guard.made(super().call(__context, __obj, *args, **kwargs))
        return inherit(result, owner, args, kwargs) if isinstance(owner, str) else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def measured(*args: Any, **kwargs: Any) -> str:
            values = [*args, *kwargs.values()]
            if value.__name__ == "format_map" and args and isinstance(args[0], Mapping):
                values = list(args[0].values())
            self.guard.braces(value.__self__, values)
            return inherit(wrapped(*args, **kwargs), value.__self__, values)

        return measured

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Cycler) and attr == "items":
            return False  # a tuple of its arguments, which was not measured
        refused = attr in REFUSED_METHODS and isinstance(obj, str | bytes | int)
        return not refused and super().is_safe_attribute(obj, attr, value)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and result are measured."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # Jinja's own argument comes before the value

        def guarded(*args: Any, **kwargs: Any) -> Any:
            guard = self.guard
            values = guard.filter(name, args[first:], kwargs)
            return inherit(guard.made(function(*args[:first], *values, **kwargs)), values, kwargs)

        return update_wrapper(guarded, function)


class MeasuredNamespace(Namespace):
    """Jinja's namespace, the one value that a template may change, with the size limit of the others."""

    def __init__(self, sandbox: Sandbox, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        # Attributes of a namespace are the template's variables, so ours go around them.
        object.__setattr__(self, "_sandbox", sandbox)
        object.__setattr__(self, "_sizes", {})
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}; choose a name without an underscore in front")
        guard: Guard = object.__getattribute__(self, "_sandbox").guard
        sizes: dict[str, int] = object.__getattribute__(self, "_sizes")
        sizes[name] = guard.measure((value,))  # in a tuple, so that a namespace is refused
        guard.room(sum(sizes.values()))
        super().__setitem__(name, value)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > MAX_DATE_FORMAT:
        raise LimitError(f"strftime_now with a format of more than {MAX_DATE_FORMAT} characters")
    return datetime.now().strftime(format)


@pass_eval_context
def _join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """Jinja's filter, with a separator that is `Sourced`, so that the result keeps the marks of the texts."""
    text: str = do_join(context, value, d if isinstance(d, Sourced) else Sourced(str(d)), attribute)
    return text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
