"""No chat template escapes its sandbox, runs long or fills the memory."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from attnzoo.tokenizer import chat
from tests.helpers.chat_templates import CONVERSATIONS, render


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ['x'] | map(attribute='__class__') | list }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os.system('id') }}",
        "{{ namespace.__init__ }}",
        "{{ namespace.func }}{{ namespace.args }}{{ namespace.keywords }}",
        "{{ ''.format.func }}{{ ''.format.args }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ dict.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ loop.__class__ }}{% for x in [1] %}{{ loop._iterable.__class__ }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{{ (messages | map('upper')).gi_frame.f_globals }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ ('{0.__class__}' | safe).format(1) }}",
        "{{ ''.format.__self__.__class__ }}",
        "{% set ns = namespace(__class__='x') %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}{{ ns }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends '/etc/passwd' %}",
        "{{ lipsum.__globals__ }}",
        "{{ [].__class__ }}",
        "{{ undefined_name.__class__ }}",
    ],
)
def test_known_ways_out_of_a_sandbox_are_closed(source):
    # An attribute that is not given is undefined: to print it is nothing, to use it an error.
    try:
        text = render(source)
    except ValueError as error:
        text = str(error).removeprefix("the chat template refuses this conversation: ")
        text = "" if text.startswith(("SecurityError: ", "UndefinedError: ", "TypeError: no loader")) else text
    assert text.strip() in ("", "[Undefined]")


def test_objects_of_others_do_not_reach_the_template():
    with pytest.raises(ValueError, match=r"messages\[0\].content is of type PosixPath"):
        render("{{ messages[0].content.unlink() }}", [{"role": "user", "content": Path("x")}])
    nested: list = []
    for _ in range(40):
        nested = [nested]
    with pytest.raises(ValueError, match="levels"):
        render("x", [{"content": nested}])


EMPTY_LOOPS = "".join(f"{{% for a{i} in range(99999) %}}" for i in range(4)) + "{% endfor %}" * 4


@pytest.mark.parametrize(
    "source",
    [
        EMPTY_LOOPS,
        "{% set x %}" + EMPTY_LOOPS + "{% endset %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in range(99999) %}{{ range(99999) | select('in', range(99999) | list) | list | length }}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) | sort(reverse=true) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ '' }}{{ ''.join(range(9999) | map('string')) and '' }}{% endfor %}",
    ],
    ids=range(8),
)
def test_a_template_that_takes_long_is_stopped(source, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"takes longer than 0\.3 s|limit"):  # else it would run for hours
        render(source)
    assert render("{{ messages[0].role }}") == "user"


def test_the_deadline_holds_in_any_thread_and_leaves_the_others_tracing_alone(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    found = []

    def work() -> None:
        try:
            render(EMPTY_LOOPS)
        except ValueError as error:
            found.append((str(error), sys.gettrace()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    before = sys.gettrace()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2
    assert all("takes longer" in words and trace is None for words, trace in found)
    assert sys.gettrace() is before


DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def doubling(start: str, step: str) -> str:
    return DOUBLING.replace("START", start).replace("STEP", step)


LARGE = {
    "repetition": "{{ 'x' * 10**10 }}",
    "repetition from the left": "{{ 10000000000 * 'x' }}",
    "list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power of a power": "{{ 7 ** 4000 ** 2 }}",
    "product": doubling("99999999", "ns.x * ns.x"),
    "sum": doubling("'xxxxxxxx'", "ns.x + ns.x"),
    "tilde": doubling("'xxxxxxxx'", "ns.x ~ ns.x"),
    "replace": doubling("'xxxxxxxx'", "ns.x.replace('x', 'xx')"),
    "replace filter": doubling("'xxxxxxxx'", "ns.x | replace('x', 'xx')"),
    "replace empty": "{% set x = 'x' * 1000000 %}{{ x.replace('', x) }}",
    "join": "{% set x = 'x' * 1000000 %}{{ x.join(x) }}",
    "join filter": "{% set x = 'x' * 1000000 %}{{ x | join(x) }}",
    "nested lists": doubling("[1]", "[ns.x, ns.x]"),
    "nested tuples": doubling("1", "(ns.x, ns.x)"),
    "nested dicts": doubling("1", "{'a': ns.x, 'b': ns.x}"),
    "nested by dict()": doubling("1", "dict(a=ns.x, b=ns.x)"),
    "nested by a filter": doubling("[1]", "range(2) | map(attribute='x', default=ns.x) | list"),
    "nested by batches": doubling("[1]", "range(2) | map(attribute='x', default=ns.x) | batch(2) | first"),
    "nested namespaces": doubling("1", "namespace(a=ns.x, b=ns.x)"),
    "nested keys": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
    "{{ {ns.x: 1} == {ns.x: 1} }}",
    "nested by varargs": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ m(60, 1) }}",
    "nested by kwargs": "{% macro m(n) %}{% if n %}{{ m(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}{% endif %}"
    "{% endmacro %}{{ m(60, a=1) }}",
    "range": "{% for x in range(10**9) %}{% endfor %}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent repeated": "{% set x = 'x' * 1000000 %}{{ ('%(a)s' * 1000000) % {'a': x} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format repeated": "{% set x = 'x' * 1000000 %}{{ ('{0}' * 1000000).format(x) }}",
    "format_map": "{% set x = 'x' * 1000000 %}{{ ('{a}' * 1000000).format_map({'a': x}) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "center filter": "{{ 'x' | center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ ('x' | safe).zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(1000000000) }}",
    "translate": "{{ ('x' * 1000000).translate({120: 'x' * 1000000}) }}",
    "to_bytes": "{{ (5).to_bytes(10000000000, 'big') }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000, true, true) }}",
    "indent text": "{{ ('\n' * 1000000) | indent('x' * 1000000) }}",
    "tojson indent": "{{ messages | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "round": "{{ 1.5 | round(1000000000, 'floor') }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "dates": "{{ strftime_now('%c' * 100000) }}",
    "int of a base": "{{ ('f' * 4000000) | int(0, 16) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "macro output": "{% macro m() %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endmacro %}{{ m() }}",
    "captured output": "{% set x %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "many values": "".join(f"{{% set x{i} = 'x' * 4000000 %}}" for i in range(3000)),
    "many constants": "{{ 'x' | center(1000) | replace(' ', '          ') }}" * 4000,
}


@pytest.mark.heavy
def test_a_template_that_needs_much_memory_is_stopped():
    """All in one process of bounded memory: without the limits it fails, or runs for hours."""
    program = f"""
import json, resource, sys
from attnzoo.tokenizer import chat
from attnzoo.tokenizer.chat import ChatTemplate
chat.MAX_SECONDS = 0.5
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
def peak_mib():  # ru_maxrss would begin with that of the test's own process
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
for name, source in json.load(sys.stdin).items():
    words = "no error"
    try:
        ChatTemplate(source, special={{}}).render({CONVERSATIONS[0]!r})
    except ValueError as error:
        words = str(error)
    print(json.dumps([name, words[:200], peak_mib()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(LARGE),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(LARGE), (rows[-1:], done.stderr[-2000:])
    for name, words, peak_mib in rows:
        refused = ("limit", "longer than", "Range too big", "SecurityError")
        assert any(word in words for word in refused), (name, words)
        assert peak_mib < 1500, (name, words, peak_mib)
